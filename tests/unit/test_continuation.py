"""The last words of a run that ended early."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from automodel.config import load_config
from automodel.launch.continuation import continuation, note_continuation, noted_continuation
from automodel.launch.worker import LAUNCHER_PID, STATUS_DIR


def words(*argv: str, folder: str = "outputs/x", **env: str) -> tuple[str, list[str]]:
    first, command = continuation(list(argv), Path(folder), env=env).splitlines()
    return first, shlex.split(command)[3:]


def test_the_command_is_the_same_with_its_folder():
    assert words("rng.seed=1") == ("to continue:", ["rng.seed=1", "output_dir=outputs/x"])
    assert words("output_dir=mine", "rng.seed=1") == ("to continue:", ["output_dir=mine", "rng.seed=1"])
    assert words(RANK="0")[0] == "to continue, under the same launcher:"
    assert words(RANK="0", **{LAUNCHER_PID: "7"})[0] == "to continue:"


def test_a_folder_and_arguments_of_any_characters_can_be_given_again():
    for folder in ("a b/it's", "x,y", "k=v", "(1)", 'say "x"', "[1]"):
        _, argv = words("rng.seed=1", folder=folder)
        assert load_config(argv, env={}).output_dir == folder


def test_a_run_that_never_resumes_is_told_how_to():
    assert words("checkpoint.resume=never")[1] == ["checkpoint.resume=auto", "output_dir=outputs/x"]


def test_the_launcher_tells_it_only_where_there_is_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv(STATUS_DIR, str(tmp_path))
    monkeypatch.setenv(LAUNCHER_PID, str(os.getpid()))
    assert noted_continuation(tmp_path) is None
    note_continuation("to continue:\n  this", tmp_path / "checkpoints")
    assert noted_continuation(tmp_path) is None
    (tmp_path / "checkpoints" / "latest").mkdir(parents=True)
    assert noted_continuation(tmp_path) == "to continue:\n  this"
