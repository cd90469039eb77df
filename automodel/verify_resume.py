"""``python -m automodel.verify_resume``: kill a run again and again, and compare it with a whole one."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, PositiveInt

from automodel.cli.command_line import read_alone, rows_of_keys, run_verb
from automodel.config.schema import Section
from automodel.types import ExitStatus


class Keys(Section):
    kills: PositiveInt = Field(3, description="how often the second run is killed or stopped")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="seed for the kinds and moments of the kills")
    num_steps: Annotated[int, Field(ge=2)] = Field(
        20, description="optimizer steps of each run, if step_scheduler.max_steps is not less"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Verify the command line ``argv`` (default: this process's) and exit with the status."""
    run_verb(_work, argv, usage=_usage)


def _work(argv: list[str]) -> ExitStatus:
    keys, cfg, _ = read_alone("verify_resume", argv, "verify", Keys)
    from automodel.proofs.resume import verify_resume

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the run in progress too
    return verify_resume(cfg, kills=keys.kills, seed=keys.seed, num_steps=keys.num_steps)


def _usage() -> str:
    return f"""python -m automodel.verify_resume [FILE.yaml] [key=value of a run ...] [verify.kills=3] [verify.seed=0]

Runs the configuration to its end. Then runs it again, kills it at random moments and restarts it until it is done.
Compares every line of the metrics and the final weights bit for bit. Neither run is kept.

Keys
{rows_of_keys("verify", Keys)}

Example
  python -m automodel.verify_resume launch.nproc_per_node=2 distributed=fsdp2 step_scheduler.local_batch_size=8

The kinds of kill take turns: KILL of one worker, of the launcher, of all processes; TERM of one worker, of the
launcher; INT. Every other kill hits a save. Validation generates no answers. On CUDA add rng.deterministic=true.
Status 0: the same; 1: not the same, or a run failed; 2: wrong input. Two runs with their checkpoints go to the
temporary folder meanwhile; TMPDIR chooses another place. All other keys: python -m automodel.run --help"""


if __name__ == "__main__":
    main()
