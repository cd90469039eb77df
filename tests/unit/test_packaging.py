"""The console script, as it is installed with the wheel."""

from __future__ import annotations

import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_no_folder_of_tests_is_passed_over(request):
    patterns = request.config.getini("norecursedirs")
    folders = [folder.name for folder in (ROOT / "tests").iterdir() if folder.is_dir()]
    assert "dist" in folders
    assert not [folder for folder in folders if folder[0] != "_" and any(fnmatch(folder, each) for each in patterns)]


@pytest.mark.parametrize(
    ("argv", "status", "words"),
    [
        (
            ["runn"],
            2,
            "runn is not a verb; there are: run, preview, check_parity, verify_resume, export; did you mean run?",
        ),
        (["--help"], 0, "automodel VERB"),
        (["run", "--help"], 0, "step_scheduler"),
        (["run", "no_such_key=1"], 2, "no_such_key is not a known key"),
    ],
)
def test_the_console_script_knows_its_verbs(argv, status, words):
    done = subprocess.run(
        [sys.executable, "-m", "automodel", *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == status and words in done.stdout + done.stderr and "Traceback" not in done.stderr
