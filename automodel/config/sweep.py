"""A sweep: a command line for each of its jobs, and a folder for each of them."""

from __future__ import annotations

import hashlib
import itertools
import os
import re

from automodel.config.arguments import read_arguments
from automodel.config.choices import quoted
from automodel.config.command_line import compose_command_line
from automodel.config.overrides import lines_of, parse_overrides
from automodel.types import UserError


def sweep_jobs(argv: list[str]) -> list[list[str]] | None:
    """Return the command line of every job of a sweep, or None where the command line is no sweep.

    Jobs that would write to the same ``output_dir`` get a folder each below it, named after the swept values and not
    numbered, so that a job finds its own folder again when values are added.

    Raises:
        UserError: two jobs are the same.
    """
    arguments = read_arguments(argv)
    if not arguments.is_sweep:
        return None
    parsed = parse_overrides(arguments.overrides, [], is_sweep=True)
    combinations = list(itertools.product(*(lines_of(override) for override in parsed)))
    jobs = [[*arguments.flags(), *arguments.show, *lines] for lines in combinations]
    folders = [_output_dir(job) for job in jobs]
    given = [os.path.abspath(folder) for folder in folders if folder is not None]
    if len(set(given)) == len(given):
        return jobs
    swept = [index for index, override in enumerate(parsed) if override.is_sweep_override()]
    names = ["_".join(_folder_name(lines[index]) for index in swept) for lines in combinations]
    own = [os.path.join(folder, name) if folder else None for folder, name in zip(folders, names, strict=True)]
    if twice := [folder for number, folder in enumerate(own) if folder and folder in own[:number]]:
        raise UserError(
            f"-m: two jobs of the sweep are the same, and both would write to {twice[0]}; give a value once"
        )
    return [[*job, f"output_dir={quoted(folder)}"] if folder else job for job, folder in zip(jobs, own, strict=True)]


def _output_dir(job: list[str]) -> str | None:
    trees = compose_command_line(job).trees
    return trees[0].get("output_dir") if trees else None


def _folder_name(line: str) -> str:
    """Return an override as the name of a folder, in characters that an override and a shell take unquoted."""
    exact = line.lstrip("+~").replace("=", "-", 1)
    plain = re.sub(r"[^A-Za-z0-9._@+-]+", "-", exact)[:80]
    return plain if plain == exact else f"{plain.strip('-')}-{hashlib.sha256(line.encode()).hexdigest()[:6]}"
