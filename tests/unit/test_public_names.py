"""The documented interface of ``automodel.distributed``: names, parameters, defaults, and what they accept."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

import automodel.distributed as public
from automodel.distributed import dp_eval_sample_shard
from automodel.distributed.parallel.ddp import DDP
from automodel.distributed.parallel.fsdp2 import FSDP2
from automodel.distributed.parallel.megatron_fsdp import MegatronFSDP
from automodel.distributed.runtime import backends
from automodel.types import UserError

DOCUMENTED = {
    "DistInfo": "backend, rank, world_size, device, is_main",
    "initialize_distributed": "backend, timeout_minutes=1",
    "destroy_global_state": "",
    "get_rank_safe": "",
    "get_world_size_safe": "",
    "get_local_rank_preinit": "",
    "get_local_world_size_preinit": "",
    "FirstRankPerNode": "",
    "barrier_and_log": "string",
    "dp_eval_sample_shard": "distributed_config, dp_rank, dp_size",
    "get_sync_ctx": "model, is_optim_step, defer_fsdp_grad_sync=True",
    "reduce_loss": "loss_store, total_num_tokens, per_token_loss=True, dp_group=None",
    "rescale_gradients": "model, num_tokens_for_grad_scaling, dp_group=None",
    "clip_gradients": "model, clip_norm, foreach=True",
    "_create_gloo_group": "",
    "_barrier_with_timeout": "timeout, group=None",
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_parameters_and_defaults_are_the_documented_ones(name):
    found = list(inspect.signature(getattr(public, name)).parameters.values())
    written = [part.strip().partition("=") for part in DOCUMENTED[name].split(",") if part.strip()]
    for parameter, (expected, _, default) in zip(found, written, strict=False):
        assert parameter.name == expected and parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert str(parameter.default) == (default or str(inspect.Parameter.empty))
    assert len(found) >= len(written)
    # What we add beyond is optional.
    assert all(parameter.default is not inspect.Parameter.empty for parameter in found[len(written) :])


def test_the_first_rank_can_start_a_group_by_a_method():
    method = public.FirstRankPerNode._try_bootstrap_pg
    assert inspect.isfunction(method) and next(iter(inspect.signature(method).parameters)) == "self"


class Kind(enum.Enum):
    SHARDED = "fsdp2"
    WHOLE = "ddp"


@dataclasses.dataclass
class FSDP2Config:
    sequence_parallel: bool = False


@dataclasses.dataclass
class Options:
    strategy: object


NAMING = {
    True: [
        FSDP2(), MegatronFSDP(), "fsdp2", "FSDP", "megatron_fsdp", "somewhere.FSDP2Manager", "hsdp", Kind.SHARDED,
        {"strategy": "fsdp2"}, {"_target_": "automodel.distributed.parallel.fsdp2.FSDP2", "tp_size": 2}, FSDP2Config(),
        OmegaConf.create({"_target_": "automodel.distributed.parallel.megatron_fsdp.MegatronFSDP"}), FSDP2,
        OmegaConf.create({"name": "fsdp2"}), types.SimpleNamespace(strategy="megatron_fsdp"), Options("fsdp2"),
        Options(Kind.SHARDED), {"strategy": {"_target_": "a.FSDP2"}}, types.SimpleNamespace(_target_=FSDP2Config),
    ],
    False: [
        DDP(), "ddp", "DDP", "DistributedDataParallel", "a.b.DDPManager", Kind.WHOLE, {"strategy": "ddp"},
        {"_target_": "automodel.distributed.parallel.ddp.DDP"}, OmegaConf.create({"strategy": "ddp", "fsdp": None}),
        types.SimpleNamespace(name="ddp"), Options("ddp"), Options(DDP()), DDP,
    ],
}  # fmt: skip


@pytest.mark.parametrize("is_sharded", NAMING)
def test_any_configuration_that_names_its_strategy_says_who_generates_alone(is_sharded):
    for config in NAMING[is_sharded]:
        assert dp_eval_sample_shard(config, 1, 4) == (None if is_sharded else (1, 4)), config
        assert dp_eval_sample_shard(config, 0, 1) is None


@pytest.mark.parametrize("config", ["pipeline", {}, {"strategy": None}, 3, None, types.SimpleNamespace(tp_size=1)])
def test_a_configuration_that_names_no_strategy_is_refused(config):
    with pytest.raises(UserError, match="names no strategy that is known"):
        dp_eval_sample_shard(config, 0, 2)


def pretend(monkeypatch, kind: str, num_devices: int = 8, built: tuple[str, ...] = ()) -> None:
    """Have torch show devices of a kind that is not here, and backends of which nothing runs."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: kind != "cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: num_devices)
    for name in ("nccl", "xccl"):
        monkeypatch.setattr(dist, f"is_{name}_available", lambda name=name: name in built)


def provide(monkeypatch, package: str, backend: str) -> None:
    """Have ``import package`` register a backend, as the vendors' packages do."""
    monkeypatch.setattr(dist.Backend, "backend_list", [*dist.Backend.backend_list, backend])
    parts = package.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))


@pytest.mark.parametrize(
    ("kind", "built", "package", "spec"),
    [
        ("cpu", (), None, "gloo"),
        ("cuda", ("nccl",), None, "cpu:gloo,cuda:nccl"),
        ("mps", (), None, "gloo"),
        ("xpu", ("xccl",), None, "cpu:gloo,xpu:xccl"),
        ("xpu", (), ("oneccl_bindings_for_pytorch", "ccl"), "cpu:gloo,xpu:ccl"),
        ("xpu", ("xccl",), ("oneccl_bindings_for_pytorch", "ccl"), "cpu:gloo,xpu:xccl"),
        ("hpu", (), ("habana_frameworks.torch.distributed.hccl", "hccl"), "cpu:gloo,hpu:hccl"),
    ],
)
def test_auto_means_the_backend_of_the_device(monkeypatch, kind, built, package, spec):
    pretend(monkeypatch, kind, built=built)
    if package is not None:
        provide(monkeypatch, *package)
    device = backends.choose_device("auto")
    assert device.type == kind
    assert backends.backend_spec("auto", device) == spec


def test_an_hpu_is_found_though_it_is_no_accelerator_in_torchs_sense(monkeypatch):
    pretend(monkeypatch, "cpu")
    provide(monkeypatch, "habana_frameworks.torch", "hccl")
    monkeypatch.setattr(
        torch, "hpu", types.SimpleNamespace(is_available=lambda: True, device_count=lambda: 2), raising=False
    )
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert backends.choose_device("auto") == torch.device("hpu", 1)


@pytest.mark.parametrize(("name", "package"), [("ccl", "oneccl_bindings_for_pytorch"), ("hccl", "habana_frameworks")])
def test_a_backend_of_a_package_that_is_not_there_names_the_package(monkeypatch, name, package):
    kind = {"ccl": "xpu", "hccl": "hpu"}[name]
    pretend(monkeypatch, kind)
    with pytest.raises(UserError, match=rf"dist_env.backend={name} comes with {package}\S*, which cannot be imported"):
        backends.backend_spec(name, torch.device(kind))


@pytest.mark.parametrize(
    ("backend", "kind", "spec"),
    [
        ("cpu:gloo,cuda:nccl", "cuda", "cpu:gloo,cuda:nccl"),
        ("cuda:nccl, cpu:gloo", "cuda", "cpu:gloo,cuda:nccl"),
        ("cuda:nccl", "cuda", "cpu:gloo,cuda:nccl"),
        ("cuda:gloo", "cuda", "cpu:gloo,cuda:gloo"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu:gloo"),
        ("cpu:gloo", "cuda", "cpu:gloo"),
    ],
)
def test_backends_can_be_named_by_device(monkeypatch, backend, kind, spec):
    pretend(monkeypatch, kind, built=("nccl",))
    device = backends.choose_device(backend)
    assert device.type == ("cuda" if "cuda" in spec else "cpu")
    assert backends.backend_spec(backend, device) == spec


@pytest.mark.parametrize("backend", ["cuda:nccl", "cpu:nccl", "cpu:nothing"])
def test_backends_by_device_that_cannot_be_are_told(monkeypatch, backend):
    pretend(monkeypatch, "cpu", built=("nccl",))
    with pytest.raises(UserError, match=r"dist_env.backend="):
        backends.backend_spec(backend, backends.choose_device(backend))


def test_a_rank_that_sees_its_own_device_alone_computes_on_it(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    pretend(monkeypatch, "cuda", num_devices=1, built=("nccl",))
    assert backends.choose_device("auto") == torch.device("cuda", 0)
    pretend(monkeypatch, "cuda", num_devices=2, built=("nccl",))
    with pytest.raises(UserError, match="local rank 3 has no cuda device: this node shows 2"):
        backends.choose_device("auto")
    for name in ("SLURM_STEP_ID", "SLURM_GPUS_PER_TASK"):  # such as 2, or a100:2
        monkeypatch.setenv(name, "a100:2")
    assert backends.choose_device("auto") == torch.device("cuda", 1)


def refusal(store: dist.Store, monkeypatch, visible: list[str]) -> list[str]:
    """Return what each of two ranks with one visible device each hears."""
    told = []
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible[rank])
        if rank == 0:  # the other one comes first, so that this process waits for nobody
            monkeypatch.setenv("LOCAL_RANK", "1")
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible[1])
            text = f"1 1 {backends._identity(torch.device('cuda', 0))}"
            store.set("device/1", text)
            monkeypatch.setenv("LOCAL_RANK", "0")
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible[0])
        try:
            backends.refuse_shared_devices(store, torch.device("cuda", 0), rank=rank, world_size=2)
            told.append("")
        except UserError as error:
            told.append(str(error))
    return told


def test_ranks_that_would_share_a_device_are_refused_alike(monkeypatch):
    pretend(monkeypatch, "cuda", num_devices=1)
    assert refusal(dist.HashStore(), monkeypatch, ["0", "1"]) == ["", ""]
    first, second = refusal(dist.HashStore(), monkeypatch, ["0", "0"])
    assert first == second
    assert "local rank 1 has no cuda device: this node shows 1; start at most 1 processes a node" in first


EXITING = """
import atexit, os, sys, types
import torch, torch.distributed as dist
from automodel.distributed import destroy_global_state, initialize_distributed
first, second = initialize_distributed("{backend}"), initialize_distributed("gloo", timeout_minutes=2)
assert first == second and first.backend == "gloo", (first, second)
sys.modules["deep_ep"] = types.ModuleType("deep_ep")
Buffer = type("Buffer", (), {{"explicitly_destroy": True, "destroy": lambda self: print("cleaned up", flush=True)}})
Buffer.__module__ = "deep_ep.buffer"
buffer = Buffer()
if "{ends}" == "itself":
    destroy_global_state()
    print("ended", flush=True)
if os.fork() == 0:
    atexit._run_exitfuncs()  # a child that ends as programs do leaves the group alone
    os._exit(0)
os.wait()
dist.all_reduce(torch.ones(1)) if dist.is_initialized() else None
if "{ends}" == "badly":
    raise KeyError("something")
"""


@pytest.mark.parametrize(("ends", "printed"), [("well", ["cleaned up"]), ("badly", ["cleaned up"]),
                                               ("itself", ["cleaned up", "ended"])])  # fmt: skip
def test_the_group_ends_with_the_interpreter_once(ends, printed):
    script = EXITING.format(backend="cpu:gloo,cuda:nccl", ends=ends)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == printed, done.stderr
    assert ("KeyError" in done.stderr) == (ends == "badly")
