"""A task, a row format and an objective of a user's own train without a change of the package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.recipes.command import ROOT, command_line, load_as_the_screen_says, records, run

KEYS = ["recipe._target_=tests.recipes.extensions.regression.recipe", "recipe.name=regression", "dataset=jsonl",
        "dataset.format=tests.recipes.extensions.regression.ScoredFormat", "dataset.validation_share=0.1", "model=demo",
        "evaluation=loss"]  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Texts of different lengths, whose score is the share of one letter."""
    path = tmp_path_factory.mktemp("scores") / "rows.jsonl"
    texts = ["".join("ab"[(index >> bit) & 1] for bit in range(7)) for index in range(128)] * 3
    path.write_text("".join(json.dumps({"text": text, "score": text.count("a") / 7}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_regression_of_ones_own_trains_validates_and_loads(rows, tmp_path, num_ranks):
    run(
        *KEYS, f"dataset.path={rows}", f"output_dir={tmp_path}/run", "step_scheduler.num_epochs=3", "optimizer.lr=3e-3",
        "step_scheduler.global_batch_size=32", "step_scheduler.local_batch_size=16",
        f"launch.nproc_per_node={num_ranks}",
    )  # fmt: skip
    assert records(tmp_path / "run", "validation")[-1]["loss"] < 0.01  # the variance of the scores is 1 / 28
    model = load_as_the_screen_says(tmp_path / "run")
    assert type(model).__name__ == "LlamaForSequenceClassification"
    tokens = torch.tensor([[1, 70, 70, 70, 70, 70, 70, 70], [1, 71, 71, 71, 71, 71, 71, 71]])
    few, many = sorted(model(input_ids=tokens).logits[:, 0].tolist())
    assert few < 0.3 and many > 0.7


def test_the_preview_shows_the_scores(rows):
    text = command_line(*KEYS, f"dataset.path={rows}", "preview.num_rows=2", verb="preview")
    assert "row 1 of" in text and ": 1.0" in text and "aaaaaaa" in text


def test_rows_of_another_kind_are_refused_by_the_task(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "score": 1}\n')
    others = [key for key in KEYS if not key.startswith("recipe.") and "share" not in key]
    text = run(*others, f"dataset.path={path}", f"output_dir={tmp_path}/run", status=2)
    assert "ScoredFormat does not suit this recipe; it takes messages or" in text
    assert "not one that reads Scored" in text


def test_rows_of_a_task_that_does_not_say_so_are_not_streamed(rows, tmp_path):
    others = [key for key in KEYS if "share" not in key]
    stream = ["dataset.streaming=true", "step_scheduler.max_steps=2", "validation_dataset=none"]
    text = run(*others, *stream, f"dataset.path={rows}", f"output_dir={tmp_path}/run", status=2)
    assert "dataset.streaming=true does not apply to recipe=regression, which must know all rows first" in text


def test_a_changed_format_prepares_the_rows_again(tmp_path):
    """The cache must not give rows that an earlier version of the user's file has prepared."""
    (tmp_path / "rows.jsonl").write_text('{"q": "one", "a": "two"}\n')
    code = (
        "from automodel.data.sources import FileDataset\n"
        "from automodel.models.char_tokenizer import build_char_tokenizer\n"
        "from tests.unit.rows import load_sft\n"
        "source = FileDataset(path='rows.jsonl', format='own.Own')\n"
        "print(load_sft(source, build_char_tokenizer(), model_max_length=None).prompts[0].answer)"
    )
    own = (
        "from automodel.data.formats.row_format import RowFormat\n"
        "from automodel.data.formats.samples import PromptCompletion\n"
        "class Own(RowFormat):\n"
        "    sample, required = PromptCompletion, ('q', 'a')\n"
        "    def read(self, columns, row):\n"
        "        return PromptCompletion(row['q'], row['a'].CASE())\n"
    )
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "AUTOMODEL_CACHE": str(tmp_path / "cache"), "PATH": ""}
    for case in ("upper", "title", "title"):
        (tmp_path / "own.py").write_text(own.replace("CASE", case))
        done = subprocess.run(
            [sys.executable, "-B", "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == getattr("two", case)()
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2
