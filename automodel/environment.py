"""What launchers pass to a process through its environment, and what can be wrong with it; free of torch.

torchrun's variables come first. SLURM's count only inside a step: a batch script has them too, without being one of
the ranks that ``srun`` starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from automodel.types import UserError

Environment = Mapping[str, str]

RANK = ("RANK", "SLURM_PROCID")
WORLD_SIZE = ("WORLD_SIZE", "SLURM_NTASKS")
LOCAL_RANK = ("LOCAL_RANK", "SLURM_LOCALID")
LOCAL_WORLD_SIZE = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
_SLURM_NUMBERS = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID")
FIRST_PORT, NUM_PORTS = 15000, 15000
"""Ports for SLURM steps: below those that systems use for outgoing connections; eight steps of a job differ."""


def number_from(env: Environment, names: tuple[str, ...], *, default: int) -> int:
    """Return the value of the first of the variables ``names`` that is set and counts.

    Raises:
        UserError: it is not a whole number.
    """
    for name in names:
        value = env.get(name)
        if value is None or (name.startswith("SLURM_") and "SLURM_STEP_ID" not in env):
            continue
        try:
            return int(value)
        except ValueError:
            raise UserError(f"{name}={value!r} in the environment is not a whole number") from None
    return default


def environment_problems(env: Environment) -> list[str]:
    """Return what is wrong with the environment by itself, a line each; an empty one is that of a single process."""
    is_slurm = has_slurm_ranks(env)
    names = (*_NUMBERS, *(_SLURM_NUMBERS if is_slurm else ()))
    wrong = [f"{name}={env[name]}" for name in names if name in env and not env[name].isdecimal()]
    if wrong:
        return [
            f"{' and '.join(wrong)} in the environment: ranks and sizes must be whole numbers, 0 or more; "
            "start with torchrun, or export the right ones"
        ]
    problems = [*(_slurm_problems(env) if is_slurm else _rank_problems(env)), *_local_problems(env)]
    return problems or [*_address_problems({**env, **slurm_exports(env)})]


def slurm_exports(env: Environment) -> dict[str, str]:
    """Return the variables of torchrun that ``env`` lacks, for a step of several SLURM tasks.

    Rank 0 is on the first node of the step. Every task derives the same address and port.
    """
    if not has_slurm_ranks(env) or number_from(env, WORLD_SIZE, default=1) == 1:
        return {}
    found = {torch_name: env[name] for torch_name, name in (RANK, WORLD_SIZE, LOCAL_RANK) if name in env}
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST")
    if nodes:
        found["MASTER_ADDR"] = first_node(nodes)
    job, step = env.get("SLURM_JOB_ID", ""), env["SLURM_STEP_ID"]
    if job.isdecimal() and step.isdecimal():
        found["MASTER_PORT"] = str(FIRST_PORT + (8 * int(job) + int(step)) % NUM_PORTS)
    return {name: value for name, value in found.items() if name not in env}


def first_node(nodes: str) -> str:
    """Return the first host of a SLURM node list such as ``login,gpu[07-09,12]-b``.

    >>> first_node("gpu[07-09,12]-b,login")
    'gpu07-b'
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else nodes)


def uses_agent_store(env: Environment) -> bool:
    """Return whether torchrun's agent already serves the store at MASTER_ADDR."""
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def has_slurm_ranks(env: Environment) -> bool:
    """Return whether ``srun`` started this process as a rank, and torchrun did not."""
    return "RANK" not in env and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env


def _not_below(env: Environment, name: str, limit: str, hint: str) -> Iterator[str]:
    if int(env.get(name, "0")) >= int(env[limit]):
        yield f"{name}={env.get(name, '0')} in the environment is not below {limit}={env[limit]}; {hint}"


def _rank_problems(env: Environment) -> Iterator[str]:
    names = [name for name in ("RANK", "WORLD_SIZE") if name in env]
    if len(names) == 1:
        other = "WORLD_SIZE" if names == ["RANK"] else "RANK"
        yield f"the environment has {names[0]} without {other}; start with torchrun, or unset {names[0]}"
    elif names:
        yield from _not_below(env, "RANK", "WORLD_SIZE", "ranks count from 0 to WORLD_SIZE - 1")


def _slurm_problems(env: Environment) -> Iterator[str]:
    env = {"SLURM_NTASKS": "1", **env}
    yield from _not_below(
        env, "SLURM_PROCID", "SLURM_NTASKS", "start the tasks with srun, and leave its variables as they are"
    )
    if int(env.get("WORLD_SIZE", env["SLURM_NTASKS"])) != int(env["SLURM_NTASKS"]):
        yield (
            f"WORLD_SIZE={env['WORLD_SIZE']} in the environment, but srun started SLURM_NTASKS={env['SLURM_NTASKS']} "
            "tasks; unset WORLD_SIZE, or export RANK as well"
        )


def _local_problems(env: Environment) -> Iterator[str]:
    if "LOCAL_WORLD_SIZE" not in env:
        return
    yield from _not_below(env, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK counts the ranks of one node from 0")
    if int(env["LOCAL_WORLD_SIZE"]) > int(env.get("WORLD_SIZE", env["LOCAL_WORLD_SIZE"])):
        yield (
            f"LOCAL_WORLD_SIZE={env['LOCAL_WORLD_SIZE']} in the environment is more than "
            f"WORLD_SIZE={env['WORLD_SIZE']}; WORLD_SIZE counts the ranks of all nodes"
        )


def _address_problems(env: Environment) -> Iterator[str]:
    world_size = number_from(env, WORLD_SIZE, default=1)
    if world_size == 1:
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        launch = (
            "export the first node's name and a free port before srun"
            if "SLURM_STEP_ID" in env
            else "start with torchrun, or let launch.nproc_per_node start the workers"
        )
        are = "is" if len(missing) == 1 else "are"
        yield f"several ranks were started ({world_size}) but {' and '.join(missing)} {are} not set; {launch}"
    port = env.get("MASTER_PORT") or "1"
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        yield f"MASTER_PORT={port} in the environment is no port; give a free one, a whole number from 1024 to 65535"
    yield from _loopback_problems(env, world_size)


def _loopback_problems(env: Environment, world_size: int) -> Iterator[str]:
    address = env.get("MASTER_ADDR", "")
    is_loopback = address in ("localhost", "localhost.localdomain", "::1") or address.startswith("127.")
    if not is_loopback or uses_agent_store(env):  # an agent has reached its store there
        return
    num_nodes = env.get("SLURM_STEP_NUM_NODES", "1") if "SLURM_STEP_ID" in env and "GROUP_RANK" not in env else "1"
    name = "GROUP_RANK" if "GROUP_RANK" in env else "SLURM_NODEID"
    if number_from(env, (name,), default=0) > 0:
        why = f"this process is on another node than rank 0 ({name}={env[name]})"
    elif int(env.get("LOCAL_WORLD_SIZE", world_size)) < world_size:
        why = f"only LOCAL_WORLD_SIZE={env['LOCAL_WORLD_SIZE']} of the {world_size} ranks are on this node"
    elif num_nodes.isdecimal() and int(num_nodes) > 1:
        why = f"the step has SLURM_STEP_NUM_NODES={num_nodes}"
    else:
        return
    yield f"MASTER_ADDR={address} is every machine's name for itself, but {why}; give the name of rank 0's node"
