"""What a user adds in a folder of his own, without a change of the package: recipes, a task and parts of all kinds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.recipes.command import FAST, ROOT, command_line, load_as_the_screen_says, records, run

OWN = Path(__file__).parent / "extensions"
PATH = {"cwd": OWN, "PYTHONPATH": str(ROOT)}
TWO_RANKS = ["launch.nproc_per_node=2", "distributed=fsdp2"]


def trained(folder: Path, *argv: str) -> Path:
    run("--config-dir", "conf", *argv, "step_scheduler.log_every_steps=1", f"output_dir={folder}", **PATH)
    return folder


def of_stories(stories: Path) -> list[str]:
    return ["model=hf", f"model.pretrained_model_name_or_path={stories}", "step_scheduler.global_batch_size=4",
            "step_scheduler.local_batch_size=2", "optimizer.lr=1e-3"]  # fmt: skip


@pytest.mark.parametrize("name", ["dpo_lite", "kd_lite", "regression"])
def test_a_recipe_of_ones_own_stays_short(name):
    assert len((OWN / f"{name}.py").read_text().splitlines()) < 60


def test_pairs_are_preferred_against_a_frozen_reference(shared_data, stories, tmp_path):
    argv = [*of_stories(stories), "recipe=dpo_lite", "dataset=jsonl", "recipe.beta=0.5",
            f"dataset.path={shared_data}/pref/dpo_en_demo.jsonl", "dataset.limit=24", "dataset.max_length=160",
            "dataset.chat_template=chatml", "dataset.truncation=left", "dataset.validation_share=0.2",
            "step_scheduler.max_steps=4", "data_checks=warn", "model.resize_embeddings=true"]  # fmt: skip
    first, *_, last = steps = records(trained(tmp_path / "one", *argv))
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)  # the model is still its own reference
    assert first["metric/margin"] == pytest.approx(0, abs=1e-4)
    assert last["metric/margin"] > 0 and 0 <= last["metric/accuracy"] <= 1 and last["loss"] < first["loss"]
    evaluations = records(tmp_path / "one", "validation")
    assert evaluations[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert {"metric/margin", "metric/accuracy"} <= evaluations[-1].keys()
    sharded = records(trained(tmp_path / "two", *argv, *TWO_RANKS))
    for one, two in zip(steps, sharded, strict=True):
        for key in ("loss", "grad_norm", "metric/margin", "metric/accuracy"):
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key


def test_a_teacher_that_is_the_student_adds_nothing(shared_data, stories, tmp_path):
    rows = [*of_stories(stories), "dataset=jsonl", f"dataset.path={shared_data}/sft/gsm8k_train.jsonl",
            "dataset.limit=16", "dataset.max_length=128", "data_checks=warn", "step_scheduler.max_steps=2"]  # fmt: skip
    teacher = f"recipe.teacher={{_target_: automodel.models.hf.HFModel, pretrained_model_name_or_path: {stories}}}"
    first, second = records(trained(tmp_path / "kd", *rows, "recipe=kd_lite", teacher, "recipe.kl_weight=0.25"))
    assert first["metric/kl"] == pytest.approx(0, abs=1e-5) and second["metric/kl"] > 0
    (plain, _) = records(trained(tmp_path / "sft", *rows))
    assert first["metric/cross_entropy"] == pytest.approx(plain["loss"], rel=1e-6)
    assert first["loss"] == pytest.approx(0.75 * plain["loss"], rel=1e-5)


def test_a_task_of_ones_own_trains_validates_and_exports(tmp_path):
    rows = [{"text": f"{n} apples", "score": n / 10} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["recipe=regression", "dataset=jsonl", f"dataset.path={tmp_path}/rows.jsonl", "peft=none",
            "dataset.format=regression.ScoredFormat", "dataset.validation_share=0.25", "optimizer.lr=3e-3",
            "step_scheduler.num_epochs=6", "step_scheduler.global_batch_size=8",
            "step_scheduler.local_batch_size=4"]  # fmt: skip
    folder = trained(tmp_path / "run", *argv)
    evaluations = records(folder, "validation")
    assert evaluations[-1]["loss"] < 0.5 * evaluations[0]["loss"]
    assert load_as_the_screen_says(folder).config.num_labels == 1
    command_line(str(folder / "checkpoints" / "latest"), str(tmp_path / "exported"), "export.trust_remote_code=true",
                 verb="export", **PATH)  # fmt: skip
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == (
        folder / "model" / "model.safetensors"
    ).read_bytes()
    shown = command_line("--config-dir", "conf", *argv, verb="preview", **PATH)
    assert "apples" in shown and "validated on as well" in shown


def test_a_loss_of_ones_own_validates_a_classifier(tmp_path):
    argv = [*FAST, "recipe=llm_seq_cls", "step_scheduler.max_steps=2"]
    smoothed = trained(tmp_path / "own", *argv, "loss_fn=smoothed", "loss_fn.smoothing=0.2")
    plain = trained(tmp_path / "plain", *argv)
    own, usual = (records(folder, "validation")[0] for folder in (smoothed, plain))
    assert own["metric/accuracy"] == usual["metric/accuracy"]  # the same fresh weights
    assert own["loss"] != usual["loss"]


def test_a_logger_a_format_and_a_scorer_of_ones_own(tmp_path):
    rows = [{"q": f"{n} + 1 =", "a": str(n + 1)} for n in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = trained(
        tmp_path / "run", "dataset=jsonl", f"dataset.path={tmp_path}/rows.jsonl", "dataset.format=parts.QuizFormat",
        "dataset.validation_share=0.5", "logger=[jsonl,text]", "evaluation=generation",
        "evaluation.max_new_tokens=2", "step_scheduler.max_steps=2",
        "evaluation.scorers.same_length._target_=parts.SameLength",
    )  # fmt: skip
    logged = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert logged == [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    record = records(folder, "validation")[-1]
    assert 0 <= record["metric/exact_match"] <= record["metric/same_length"] <= 1


def test_a_strategy_of_ones_own_trains_as_ddp_does(tmp_path):
    argv = [*FAST, "step_scheduler.max_steps=3", "launch.nproc_per_node=2"]
    own, ddp = (records(trained(tmp_path / name, *argv, f"distributed={name}")) for name in ("summed", "ddp"))
    assert [each["loss"] for each in own] == pytest.approx([each["loss"] for each in ddp], rel=1e-5)
    assert [each["grad_norm"] for each in own] == pytest.approx([each["grad_norm"] for each in ddp], rel=1e-4)
