"""Rank 0 speaks; other ranks only warn, with their rank."""

from __future__ import annotations

import logging

import pytest

from automodel.logs import add_log_file, get_logger, progress, setup_logging


@pytest.fixture(autouse=True)
def handlers_put_back():
    root = logging.getLogger("automodel")
    before = (list(root.handlers), root.level, root.propagate)
    yield
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for handler in before[0]:
        root.addHandler(handler)
    root.setLevel(before[1])
    root.propagate = before[2]


def spoken(capsys, rank: int) -> list[str]:
    setup_logging(rank)
    setup_logging(rank)  # calling again must not double the lines
    log = get_logger("automodel.train.loop")
    log.info("an [info] line")
    log.warning("a warning")
    return [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]


def test_rank_0_says_everything_once(capsys):
    assert spoken(capsys, 0) == ["an [info] line", "a warning"]


def test_other_ranks_only_warn_with_their_rank(capsys):
    assert spoken(capsys, 3) == ["[rank 3] a warning"]


def test_the_log_file_holds_plain_lines(tmp_path, capsys):
    setup_logging(0)
    add_log_file(tmp_path / "train.log")
    with progress(10, description="training") as bar:
        bar.update(1, "loss 1.0")  # no terminal here: no bar, and nothing breaks
        get_logger("automodel.x").info("step 1")
    (line,) = (tmp_path / "train.log").read_text().splitlines()
    assert line.endswith("INFO step 1") and "\x1b" not in line
