"""Rank 0 speaks; other ranks only warn, with their rank."""

from __future__ import annotations

import warnings

from automodel.logs import add_log_file, get_logger, setup_logging, warn_for_all
from automodel.screen import progress
from automodel.tasks.causal_lm import CausalLM


def spoken(capsys, rank: int) -> list[str]:
    setup_logging(rank)
    setup_logging(rank)  # calling again must not double the lines
    log = get_logger("automodel.train.loop")
    log.info("an [info] line")
    log.warning("a warning")
    warn_for_all(log, "seen by %s", "all")
    return [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()]


def test_rank_0_says_everything_once(capsys):
    assert spoken(capsys, 0) == ["an [info] line", "a warning", "seen by all"]


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


def test_warnings_of_libraries_that_ask_for_nothing_are_silent():
    from automodel.models.adapters import LoRA
    from tests.dist.tiny import tiny_llama

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        setup_logging(0)
        LoRA(rank=2, alpha=4).apply(tiny_llama(), task=CausalLM())
        warnings.warn("this one stays", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["this one stays"]
