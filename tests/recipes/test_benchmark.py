"""The benchmark's plain loop and this project train the same: otherwise their rates could not be compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from automodel.models.char_tokenizer import build_char_tokenizer
from benchmarks import plain_loop
from benchmarks.cases import Job, prepare_rows
from benchmarks.contenders import our_arguments
from tests.recipes.command import records, run

TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def job(tmp_path: Path) -> Job:
    tokenizer = build_char_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [
        {"prompt": f"{number} times {number * 7}?\n", "completion": " + ".join([str(number)] * (1 + number % 13))}
        for number in range(40)
    ]
    rows.append({"prompt": "too long\n", "completion": "x" * 600})
    return prepare_rows(tokenizer, rows, tmp_path, model=TINY, num_ranks=1, num_steps=3)


def test_plain_loop_has_the_losses_of_a_run(job: Job, tmp_path: Path):
    run(*our_arguments(job, tmp_path))
    ours, plain = records(tmp_path / "run"), list(plain_loop.train(job))
    assert [step["num_tokens"] for step in plain] == [record["num_tokens"] for record in ours]
    # Sums of float32 in another order. Adam's first update does not depend on the gradient's norm, so the third loss is
    # the first that clipping changes.
    assert len(plain) == 3
    assert [step["loss"] for step in plain] == pytest.approx([record["loss"] for record in ours], abs=1e-5)


def test_too_few_rows_are_refused(tmp_path: Path):
    tokenizer = build_char_tokenizer()
    rows = [{"prompt": "a\n", "completion": "b"}] * 15
    with pytest.raises(SystemExit, match="15 rows are enough for 1 steps"):
        prepare_rows(tokenizer, rows, tmp_path, model=TINY, num_ranks=1, num_steps=2)
