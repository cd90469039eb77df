"""The command line of a verb: keys of its own beside those of a run, and the status it leaves with."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from automodel.config import Config, has_help, hydra_flags, load_config, sweep_jobs
from automodel.config.names import did_you_mean
from automodel.launch.worker import is_worker
from automodel.secrets import masked_text
from automodel.types import ExitStatus, RunError, UserError


class VerbFailed(RunError):
    """What the verb was to do, or to show, came to nothing; the message says how."""


@dataclass(frozen=True)
class OwnKey:
    """A key that the verb alone knows.

    Attributes:
        default: its value where it is not given.
        read: returns the value of a text, or raises ValueError.
        expected: what the text must be, for the message.
        choices: the texts it may be, where they are few.
    """

    default: Any
    read: Callable[[str], Any]
    expected: str
    choices: tuple[str, ...] = ()


def whole_number(default: int, *, least: int) -> OwnKey:
    """Return a key whose value is a whole number of at least ``least``."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ValueError(text)
        return int(text)

    return OwnKey(default, read, f"a whole number of at least {least}")


def one_of(default: str | None, choices: tuple[str, ...]) -> OwnKey:
    """Return a key whose value is one of ``choices``."""
    return OwnKey(default, lambda text: choices[choices.index(text)], f"one of {', '.join(choices)}", choices)


def run_verb(work: Callable[[list[str]], ExitStatus], argv: Sequence[str] | None, *, usage: str) -> None:
    """Show ``usage`` if that is asked for, else do ``work`` and leave the process with its status.

    Args:
        argv: default: this process's.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if has_help(argv):
        print(usage)
        return
    try:
        status = work(argv)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {masked_text(problem)}", file=sys.stderr)
        status = ExitStatus.BAD_INPUT
    except VerbFailed as error:
        print(f"failed: {masked_text(str(error))}", file=sys.stderr)
        status = ExitStatus.FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = ExitStatus.FAILED
    sys.exit(status)


def read_own_keys(argv: Sequence[str], keys: Mapping[str, OwnKey]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return the value of every key of the verb, the rest of ``argv``, and what is wrong with the former.

    Args:
        keys: by name, such as ``preview.num_rows``; all begin with the same section.
    """
    section = next(iter(keys)).partition(".")[0]
    own = [arg for arg in argv if "=" in arg and key_of(arg).partition(".")[0] == section]
    values, problems = {key: each.default for key, each in keys.items()}, []
    for arg in own:
        key, text = key_of(arg), arg.partition("=")[2]
        if key not in keys:
            problems.append(f"{key} is not a known key{did_you_mean(key, keys) or '; there are: ' + ', '.join(keys)}")
            continue
        try:
            values[key] = keys[key].read(text)
        except ValueError:
            hint = did_you_mean(text, keys[key].choices)
            problems.append(f"{key}={text} must be {keys[key].expected}{hint}")
    return values, [arg for arg in argv if arg not in own], problems


def key_of(arg: str) -> str:
    """Return the key of an override such as ``+a.b=1``."""
    return arg.partition("=")[0].lstrip("+~")


def load_one_config(argv: list[str], problems: Sequence[str] = ()) -> Config:
    """Return the configuration of a run, or raise UserError with its problems after those found before."""
    try:
        cfg = load_config(argv)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if problems:
        raise UserError(*problems)
    return cfg


def require_alone(verb: str, argv: list[str], problems: Sequence[str] = ()) -> None:
    """Refuse to start runs from within a job, and of more than one configuration.

    Raises:
        UserError: this is one rank of a job, or ``argv`` holds a sweep or a flag of Hydra's; with ``problems`` as well.
    """
    if is_worker(os.environ):
        raise UserError(
            f"{verb} starts the processes of its runs itself, and this one was started as a rank of a job "
            "(RANK or SLURM_STEP_ID is in the environment): start it once, outside torchrun and srun"
        )
    if sweep_jobs(argv) is not None or hydra_flags(argv):
        raise UserError(*problems, f"{verb} takes one configuration: leave out -m, --cfg and the like")
