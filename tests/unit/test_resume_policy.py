"""What a changed configuration does to a resumed run: applied, refused by name, or of no consequence."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from automodel.config import load_config
from automodel.config.resume_policy import Verdict, judge

FACTS = {"dataset fingerprint": "f", "base weights": "b"}


def tree(*argv: str) -> dict[str, Any]:
    return load_config(["model=hf", "model.pretrained_model_name_or_path=a/b", "dataset=jsonl",
                        "dataset.path=pyproject.toml", *argv], env={}).model_dump(by_alias=True)  # fmt: skip


def verdict(before: list[str], now: list[str], **facts: str) -> Verdict:
    saved = FACTS | {"config": tree(*before)}
    changed = {name.replace("_", " "): value for name, value in facts.items()}
    return judge(saved, config=tree(*now), facts=FACTS | changed, folder="C")


def words(found: Verdict) -> tuple[list[str], list[str], list[str]]:
    return found.refused, found.unless_allowed, [str(change) for change in found.applied]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


APPLIED = [
    ([], ["optimizer.lr=1e-3"], "optimizer.lr is now 0.001, and was 1e-05"),
    ([], ["optimizer.betas=[0.8,0.9]"], "optimizer.betas is now [0.8, 0.9], and was [0.9, 0.999]"),
    ([], ["optimizer.weight_decay=0"], "optimizer.weight_decay is now 0, and was 0.01"),
    ([], ["clip_grad_norm.max_norm=null"], "clip_grad_norm.max_norm is now null, and was 1.0"),
    ([], ["step_scheduler.max_steps=9"], "step_scheduler.max_steps is now 9, and was null"),
    (
        [],
        ["lr_scheduler=constant"],
        "lr_scheduler._target_ is now automodel.optim.schedules.constant, and was automodel.optim.schedules.cosine",
    ),
    (["peft=lora"], ["peft=lora", "peft.dropout=0.1"], "peft.dropout is now 0.1, and was 0.0"),
    ([], ["evaluation=generation", "validation_dataset=demo"], "evaluation is now GenerationEvaluation, and was null"),
]


@pytest.mark.parametrize(("before", "now", "text"), APPLIED, ids=[text.split()[0] for *_, text in APPLIED])
def test_what_applies_is_told_with_both_values(before, now, text):
    refused, unless_allowed, applied = words(verdict(before, now))
    assert refused == unless_allowed == [] and text in applied


LORA = ["peft=lora", "step_scheduler.global_batch_size=8"]
REFUSED = [
    (LORA, [*LORA, "peft.alpha=64"], "peft.alpha is 64, but the checkpoint C was made with 32", False),
    (LORA, [*LORA, "peft.rank=8"], "peft.rank is 8, but", False),
    (LORA, [], "peft is null, but the checkpoint C was made with LoRA", False),
    ([], LORA, "peft is LoRA, but the checkpoint C was made with null", False),
    ([], ["optimizer=sgd"], "optimizer._target_ is automodel.optim.optimizers.sgd, but", False),
    ([], ["rng.seed=7"], "rng.seed is 7, but the checkpoint C was made with 42: the rows of a step would differ", True),
    ([], ["step_scheduler.global_batch_size=16"], "step_scheduler.global_batch_size is 16, but", True),
    ([], ["model.dtype=bfloat16"], "model.dtype is bfloat16, but the checkpoint C was made with auto", True),
]  # fmt: skip


@pytest.mark.parametrize(("before", "now", "text", "can_be_allowed"), REFUSED, ids=[r[2].split()[0] for r in REFUSED])
def test_what_does_not_apply_is_refused_by_name(before, now, text, can_be_allowed):
    refused, unless_allowed, _ = words(verdict(before, now))
    (told,) = unless_allowed if can_be_allowed else refused
    assert told.startswith(text) and "put it back" in told
    assert ("checkpoint.allow_changes=true" in told) is can_be_allowed
    assert not (refused if can_be_allowed else unless_allowed)


def test_where_nothing_trained_changes_nothing_is_said():
    now = ["logger=[jsonl,wandb]", "launch.nproc_per_node=2", "checkpoint.keep_last=5", "dataset.num_proc=2",
           "output_dir=elsewhere", "export.verify=false", "dataloader.num_workers=2"]  # fmt: skip
    assert words(verdict([], now)) == ([], [], [])


def test_rows_are_compared_by_what_they_become():
    now = ["dataset.path=README.md", "dataset.max_length=512"]
    assert words(verdict([], now))[2] == [
        "dataset.max_length is now 512, and was 2048", "dataset.path is now README.md, and was pyproject.toml"
    ]  # fmt: skip
    refused, unless_allowed, _ = words(verdict([], now, dataset_fingerprint="g"))
    assert [text.split()[0] for text in unless_allowed] == ["dataset.max_length", "dataset.path"] and not refused
    (told,) = verdict([], [], dataset_fingerprint="g").unless_allowed  # the file is another under the same name
    assert told.startswith("dataset fingerprint is g, but the checkpoint C was made with f: the rows of a step")
    stream = ["dataset.streaming=true", "step_scheduler.max_steps=5"]
    (told,) = verdict(stream, [*stream, "dataset.buffer_rows=7"]).unless_allowed  # only its first rows are known
    assert told.startswith("dataset.buffer_rows is 7")


def test_adapters_never_continue_on_another_base():
    moved = ["model.pretrained_model_name_or_path=c/d"]
    assert words(verdict(LORA, [*LORA, *moved])) == (
        [], [], ["model.pretrained_model_name_or_path is now c/d, and was a/b"]
    )  # fmt: skip
    (told,) = verdict(LORA, [*LORA, *moved], base_weights="x").refused
    assert told.startswith("model.pretrained_model_name_or_path is c/d, but the checkpoint C was made with a/b: adapt")
    (told,) = verdict(LORA, LORA, base_weights="x").refused  # replaced under the same name
    assert told.startswith("base weights is x") and "allow_changes" not in told
    assert verdict([], moved, base_weights="x").unless_allowed and not verdict([], moved, base_weights="x").refused


def test_a_key_that_one_version_lacks_is_no_change_but_one_that_users_name_is():
    now = tree()
    before = copy.deepcopy(now)
    del before["checkpoint"]["on_error"], before["optimizer"]["eps"]
    assert words(judge({"config": before}, config=now, facts={}, folder="C")) == ([], [], [])
    scratch = ["model=scratch", "model.tokenizer_name_or_path=a/b"]
    before = load_config(scratch, env={}).model_dump(by_alias=True)
    now = load_config([*scratch, "+model.config.attention_dropout=0.1"], env={}).model_dump(by_alias=True)
    (told,) = judge({"config": before}, config=now, facts={}, folder="C").unless_allowed
    assert told.startswith("model.config.attention_dropout is 0.1, but the checkpoint C was made with null")


def test_of_an_older_checkpoint_seed_batch_and_rows_are_compared():
    saved = {"rng.seed": 1, "step_scheduler.global_batch_size": 8, "dataset fingerprint": "f"}
    (told,) = judge(saved, config=tree(), facts=FACTS, folder="C").unless_allowed
    assert told.startswith("rng.seed is 42, but the checkpoint C was made with 1")
