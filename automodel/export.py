"""``python -m automodel.export``: write a Hugging Face directory from a training checkpoint of any layout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from automodel.cli.command_line import read_own_keys, rows_of_keys, run_verb
from automodel.config.schema import Section
from automodel.types import ExitStatus, RunError, UserError

if TYPE_CHECKING:
    from automodel.runner.export_checkpoint import Options


def _size(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*[KMGT]B", text.upper()):
        raise PydanticCustomError("size", "a size such as 500MB or 5GB")
    return text.upper()


class Keys(Section):
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="float32 | bfloat16 | float16; null: the run's model.dtype, or as saved"
    )
    merge: bool = Field(False, description="with adapters: write the whole model, adapters added to its weights")
    max_shard_size: Annotated[str, AfterValidator(_size)] = Field("5GB", description="largest weight file")
    verify: bool = Field(True, description="reload OUT and compare its logits with the checkpoint's before it appears")
    trust_remote_code: bool = Field(False, description="run code that config.yaml names: your classes, or a hub id's")


def main(argv: Sequence[str] | None = None) -> None:
    """Export as the command line ``argv`` (default: this process's) says, and exit with the status."""
    run_verb(_work, argv, usage=_usage)


def _work(argv: list[str]) -> ExitStatus:
    options = read_command_line(argv)
    from automodel.runner.export_checkpoint import export, read_run

    run = read_run(options)
    from automodel.hf_export.verification import ExportError
    from automodel.logs import setup_logging

    setup_logging(0)
    try:
        export(options, run)
    except (ExportError, OSError) as error:  # a full disk, for example
        raise RunError(f"{error}; {options.out} was not written") from error
    return ExitStatus.DONE


def read_command_line(argv: list[str]) -> Options:
    """Return the options; the command line and the folder to write to are checked.

    Raises:
        UserError: with every problem found.
    """
    from automodel.runner.export_checkpoint import Options

    keys, places, problems = read_own_keys(argv, "export", Keys)
    if len(places) != 2:
        found = f", not {len(places)} ({' '.join(places)})" if places else ""
        problems.append(
            f"give the checkpoint and the folder to write{found}: python -m automodel.export CHECKPOINT OUT"
        )
        raise UserError(*problems)
    checkpoint, out = (Path(place).expanduser().resolve() for place in places)
    if out.is_file():
        problems.append(f"{out} is a file; give a folder that does not exist yet")
    elif out.is_dir() and any(out.iterdir()):
        problems.append(f"{out} exists and is not empty; choose another folder, or remove it")
    if not checkpoint.is_dir():
        problems.append(f"there is no checkpoint {checkpoint}{_others(checkpoint)}")
    if problems:
        raise UserError(*problems)
    return Options(checkpoint, out, **keys.model_dump())


def _others(checkpoint: Path) -> str:
    """Name the checkpoints that are there, for a message."""
    folders = (checkpoint.parent, checkpoint.parent / "checkpoints")
    found = next((sorted(folder.glob("step_*")) for folder in folders if any(folder.glob("step_*"))), [])
    return f"; there are: {', '.join(str(path) for path in found)}" if found else ""


def _usage() -> str:
    return f"""python -m automodel.export CHECKPOINT OUT [export.dtype=bfloat16] [export.merge=true] ...

Writes the Hugging Face directory OUT from a training checkpoint, OUTPUT_DIR/checkpoints/step_XXXXXXXX (or latest), of
any layout, in one process. For a run with adapters, OUT is the adapter in PEFT's format.

Keys
{rows_of_keys("export", Keys)}

Memory: about one weight file at a time; with export.verify=true or export.merge=true, the whole model.
Status 0: written; 1: failed, and there is no OUT (files that could not be verified are kept in OUT.unverified);
2: wrong input."""


if __name__ == "__main__":
    main()
