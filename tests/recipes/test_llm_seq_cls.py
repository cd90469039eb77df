"""Sequence classification on real rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.command import ROOT, command_line, load_as_the_screen_says, records, run


def test_the_kinds_of_the_embedded_default_are_told_apart(tmp_path):
    command_line("recipe=llm_seq_cls", f"output_dir={tmp_path}/run")
    record = records(tmp_path / "run", "validation")[-1]
    assert record["metric/accuracy"] > 0.95 and record["metric/macro_f1"] > 0.95


@pytest.mark.parametrize("name", ["ag_news", "sst2", "trec"])
def test_real_rows_train_and_the_classifier_loads(shared_data: Path, stories: Path, tmp_path, name):
    from transformers import AutoModelForSequenceClassification

    data = shared_data / "seqcls"
    run(
        "recipe=llm_seq_cls", "model=hf", f"model.pretrained_model_name_or_path={stories}", "dataset=jsonl",
        f"dataset.path={data}/{name}_train.jsonl", "dataset.limit=64", "validation_dataset=jsonl",
        f"validation_dataset.path={data}/{name}_train.jsonl", "validation_dataset.limit=17", "optimizer.lr=1e-3",
        "step_scheduler.global_batch_size=16", "step_scheduler.local_batch_size=8", f"output_dir={tmp_path}/run",
    )  # fmt: skip
    record = records(tmp_path / "run", "validation")[-1]
    assert record["num_label_tokens"] == 17
    assert 0 <= record["metric/macro_f1"] <= 1
    losses = [step["loss"] for step in records(tmp_path / "run")]
    assert len(losses) == 4 and losses[-1] < losses[0] * 1.5
    model, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / "model", output_loading_info=True
    )
    assert not any(report.values())
    assert set(model.config.label2id) == {str(n) for n in model.config.id2label.values()}


def test_the_last_words_load_a_classifier_and_its_adapter(shared_data: Path, stories: Path, tmp_path):
    for peft, name in (("none", "LlamaForSequenceClassification"), ("lora", "PeftModelForSequenceClassification")):
        run(
            "recipe=llm_seq_cls", "model=hf", f"model.pretrained_model_name_or_path={stories}", "dataset=jsonl",
            f"dataset.path={shared_data}/seqcls/ag_news_train.jsonl", "dataset.limit=16", "step_scheduler.max_steps=1",
            f"peft={peft}", f"output_dir={tmp_path}/{peft}",
        )  # fmt: skip
        model = load_as_the_screen_says(tmp_path / peft)
        assert type(model).__name__ == name and model.config.num_labels == 4


def test_recipes_stay_short_and_leave_the_loop_alone():
    for file in (ROOT / "recipes").glob("llm_*.py"):
        assert len(file.read_text().splitlines()) < 200, file
    for file in (ROOT / "automodel" / "train").glob("*.py"):
        text = file.read_text().lower()
        assert "seq_cls" not in text and "classif" not in text
