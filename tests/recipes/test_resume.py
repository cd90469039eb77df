"""A run that continues: bit for bit the same, in other layouts, and with a configuration that has changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.recipes.command import FAST, numbers, records, run


def cut_back(whole: Path, again: Path, *, to_step: int) -> Path:
    """Copy a run as it was after the checkpoint of ``to_step``."""
    shutil.copytree(whole, again, symlinks=True)
    for folder in (again / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > to_step:
            shutil.rmtree(folder)
    (again / "checkpoints" / "latest").unlink()
    (again / "checkpoints" / "latest").symlink_to(f"step_{to_step:08d}")
    shutil.rmtree(again / "model")
    return again


def weights(folder: Path, name: str = "model.safetensors") -> bytes:
    return (folder / "model" / name).read_bytes()


def small_scratch(stories: Path) -> list[str]:
    return ["model=scratch", f"model.tokenizer_name_or_path={stories}", "model.config.hidden_size=64",
            "model.config.intermediate_size=64", "model.config.num_hidden_layers=1",
            "+model.config.attention_dropout=0.3"]  # fmt: skip


DROPOUT = {
    "of attention, two workers": (["dataloader.num_workers=2"], "model.safetensors"),
    "of adapters, a stream": (["peft=lora", "peft.dropout=0.3", "peft.rank=4", "dataset.streaming=true",
                               "dataloader.num_workers=1"],
                              "adapter_model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_goes_on_to_the_last_bit(stories, tmp_path, name):
    options, file = DROPOUT[name]
    is_adapter = "peft=lora" in options
    model = ["model=hf", f"model.pretrained_model_name_or_path={stories}"] if is_adapter else small_scratch(stories)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "Once " * n, "completion": "upon a time"}) + "\n" for n in range(32)))
    argv = [*model, "dataset=jsonl", f"dataset.path={rows}", "optimizer.lr=1e-2", "step_scheduler.max_steps=4",
            "step_scheduler.ckpt_every_steps=2", "step_scheduler.local_batch_size=4", *options]  # fmt: skip
    whole = tmp_path / "whole"
    run(*argv, f"output_dir={whole}")
    again = cut_back(whole, tmp_path / "again", to_step=2)
    run(*argv, f"output_dir={again}")
    assert json.loads((again / "run.json").read_text())["resumed_from_step"] == [None, 2]
    assert [numbers(record) for record in records(again)] == [numbers(record) for record in records(whole)]
    assert weights(again, file) == weights(whole, file)


@pytest.mark.parametrize("optimizer", [["optimizer=sgd", "optimizer.momentum=0.9"], ["optimizer=adamw"]],
                         ids=["sgd", "adamw"])  # fmt: skip
def test_a_checkpoint_of_fused_kernels_goes_on_sharded(tmp_path, optimizer):
    # In one process on the CPU SGD is fused; its fused kernel takes no sharded weights.
    argv = [*FAST, *optimizer, "optimizer.lr=1e-2", "step_scheduler.max_steps=4", "step_scheduler.ckpt_every_steps=2"]
    whole = tmp_path / "whole"
    run(*argv, f"output_dir={whole}")
    again = cut_back(whole, tmp_path / "again", to_step=2)
    run(*argv, f"output_dir={again}", "launch.nproc_per_node=2", "distributed=fsdp2")
    for one, other in zip(records(whole), records(again), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_the_latest_checkpoint_is_the_one_that_latest_names(tmp_path):
    argv = [*FAST, "step_scheduler.ckpt_every_steps=1", "checkpoint.keep_last=null", f"output_dir={tmp_path}/run"]
    run(*argv, "step_scheduler.max_steps=4")
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("step_00000002")  # as a run leaves it that went back to 1 and saved again
    output = run(*argv, "step_scheduler.max_steps=4", "step_scheduler.ckpt_every_steps=9")
    assert f"step_00000004 is passed over: {checkpoints}/latest names step_00000002" in output
    assert "at step 2" in output
