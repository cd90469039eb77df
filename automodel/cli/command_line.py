"""The command line of a verb: its own keys beside those of a run, and its exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from pydantic import ValidationError

from automodel.config import Config, has_help, hydra_flags, load_config, sweep_jobs
from automodel.config.help import key_row
from automodel.config.messages import as_yaml, pydantic_problems
from automodel.config.names import did_you_mean
from automodel.config.overrides import parse_overrides
from automodel.config.schema import Section
from automodel.launch.worker import is_worker
from automodel.secrets import masked_text
from automodel.types import ExitStatus, RunError, UserError

Keys = TypeVar("Keys", bound=Section)


def run_verb(work: Callable[[list[str]], ExitStatus], argv: Sequence[str] | None, *, usage: Callable[[], str]) -> None:
    """Print the usage if help is requested, else do ``work``; exit with its status.

    Args:
        argv: default: this process's.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if has_help(argv):
        print(usage())
        return
    try:
        status = work(argv)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {masked_text(problem)}", file=sys.stderr)
        status = ExitStatus.BAD_INPUT
    except RunError as error:
        print(f"failed: {masked_text(str(error))}", file=sys.stderr)
        status = ExitStatus.FAILED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = ExitStatus.FAILED
    sys.exit(status)


def rows_of_keys(section: str, keys: type[Section]) -> str:
    """Return the lines of a usage text about a verb's own keys: name, default and description of each field."""
    return "\n".join(
        key_row(f"  {section}.{name}={as_yaml(field.default).replace('e-0', 'e-')}", field.description or "", column=34)
        for name, field in keys.model_fields.items()
    )


def read_own_keys(argv: Sequence[str], section: str, keys: type[Keys]) -> tuple[Keys, list[str], list[str]]:
    """Return the verb's own keys, the rest of ``argv``, and the problems of the own keys, one line each.

    Values are written as those of a run's keys are. Where there are problems, the values returned are the defaults.

    Args:
        section: the name before the dot, such as ``preview`` in ``preview.num_rows``.
        keys: the fields of that section, each with a default.
    """
    own = [arg for arg in argv if "=" in arg and key_of(arg).partition(".")[0] == section]
    rest = [arg for arg in argv if arg not in own]
    problems: list[str] = []
    given = {
        override.key_or_group.partition(".")[2]: override.value()
        for override in parse_overrides(own, problems, is_sweep=False)
    }
    try:
        return keys.model_validate(given), rest, problems
    except ValidationError as error:
        known = [f"{section}.{name}" for name in keys.model_fields]
        problems += [_with_known(line, known) for line in pydantic_problems(error, prefix=f"{section}.")]
        return keys(), rest, problems


def _with_known(line: str, known: list[str]) -> str:
    """Add the closest key, or else all keys, to a line about an unknown one."""
    key, unknown, _ = line.partition(" is not a known key")
    return line + (did_you_mean(key, known) or f"; there are: {', '.join(known)}") if unknown else line


def key_of(arg: str) -> str:
    """Return the key of an override such as ``+a.b=1``."""
    return arg.partition("=")[0].lstrip("+~")


def load_one_config(argv: list[str], problems: Sequence[str] = ()) -> Config:
    """Return the configuration of a run.

    Args:
        problems: those found before, which are raised together with those of the configuration.

    Raises:
        UserError: there are problems.
    """
    try:
        cfg = load_config(argv)
    except UserError as error:
        raise UserError(*problems, *error.problems) from None
    if problems:
        raise UserError(*problems)
    return cfg


def read_alone(verb: str, argv: list[str], section: str, keys: type[Keys]) -> tuple[Keys, Config, list[str]]:
    """Return the own keys, the configuration and the rest of ``argv`` for a verb that starts runs itself.

    Raises:
        UserError: this is one rank of a job, ``argv`` holds a sweep or a flag of Hydra's, or anything else is wrong;
            with all problems of the command line.
    """
    values, rest, problems = read_own_keys(argv, section, keys)
    if is_worker(os.environ):
        raise UserError(
            f"{verb} starts the processes of its runs itself, but this one was started as a rank of a job "
            "(RANK or SLURM_STEP_ID is in the environment): start it once, outside torchrun and srun"
        )
    if sweep_jobs(rest) is not None or hydra_flags(rest):
        raise UserError(*problems, f"{verb} takes one configuration: leave out -m, --cfg and the like")
    return values, load_one_config(rest, problems), rest
