"""Fixtures that every test may use."""

import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from automodel import logs

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> None:
    """Keep prepared rows of tests away from those of the user."""
    os.environ["AUTOMODEL_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Put the project's logger back as it was: a verb that runs within a test sends it to the screen."""
    logger = logging.getLogger("automodel")
    before = (list(logger.handlers), logger.level, logger.propagate)
    is_main = logs._is_main
    yield
    logs._is_main = is_main
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real rows and a real model beside the checkout."""
    if not SHARED_DATA.is_dir():
        if os.environ.get("AUTOMODEL_REQUIRE_SHARED"):
            pytest.fail(f"AUTOMODEL_REQUIRE_SHARED is set, but there is no {SHARED_DATA}")
        pytest.skip("needs real rows in ../shared/data, which a plain clone does not have")
    return SHARED_DATA


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """A real pretrained Llama of 260k parameters with its tokenizer."""
    return shared_data / "models" / "stories260k"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Make a disk of a size such as ``3m``, which only root can."""
    disk = tmp_path / "disk"

    def make(size: str) -> Path:
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("a small disk can be made by root alone")
        return disk

    yield make
    if disk.is_mount():
        subprocess.run(["umount", disk], check=True)
