"""``python -m automodel.check_parity``: compare a layout with one process."""

from __future__ import annotations

import signal
from collections.abc import Sequence

from pydantic import Field

from automodel.cli.command_line import key_of, read_alone, rows_of_keys, run_verb
from automodel.config import Config
from automodel.config.schema import PositiveInt, PositiveNumber, Section
from automodel.types import ExitStatus


class Keys(Section):
    num_steps: PositiveInt = Field(3, description="optimizer steps of each run")
    tolerance: PositiveNumber = Field(1e-5, description="largest relative difference that passes")


def main(argv: Sequence[str] | None = None) -> None:
    """Compare the layouts of the command line ``argv`` (default: this process's) and exit with the status."""
    run_verb(_work, argv, usage=_usage)


def _work(argv: list[str]) -> ExitStatus:
    keys, cfg, sets_precision = read_command_line(argv)
    from automodel.proofs.parity import check_parity

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the run in progress too
    return check_parity(cfg, num_steps=keys.num_steps, tolerance=keys.tolerance, sets_precision=sets_precision)


def read_command_line(argv: list[str]) -> tuple[Keys, Config, bool]:
    """Return the own keys, the configuration, and whether ``argv`` chooses the precision; raises UserError."""
    keys, cfg, rest = read_alone("check_parity", argv, "parity", Keys)
    sets_precision = cfg.distributed.get("mixed_precision") != "auto" or any(
        key_of(arg) == "distributed.mixed_precision" for arg in rest
    )
    return keys, cfg, sets_precision


def _usage() -> str:
    return f"""python -m automodel.check_parity [FILE.yaml] [key=value of a run ...] [parity.num_steps=3] ...

Trains a few steps in one process and in your layout, and compares the loss and the gradient norm of every step and the
weights after the last one. Neither run is kept.

Keys
{rows_of_keys("parity", Keys)}

Example
  python -m automodel.check_parity launch.nproc_per_node=2 distributed=fsdp2 step_scheduler.local_batch_size=8

Both runs compute in float32 unless distributed.mixed_precision is set, with a constant learning rate and without
validation, checkpoints and adapter dropout. Status 0: within the tolerance; 1: above it, or a run failed; 2: wrong
input. Two exported models go to the temporary folder meanwhile; TMPDIR chooses another place.
All other keys: python -m automodel.run --help"""


if __name__ == "__main__":
    main()
