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
                               "step_scheduler.global_batch_size=8",
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
            "step_scheduler.ckpt_every_steps=2", "step_scheduler.local_batch_size=4", "validation_dataset=jsonl",
            f"validation_dataset.path={rows}", *options]  # fmt: skip
    whole = tmp_path / "whole"
    run(*argv, f"output_dir={whole}")
    again = cut_back(whole, tmp_path / "again", to_step=2)
    run(*argv, f"output_dir={again}")
    assert json.loads((again / "run.json").read_text())["resumed_from_step"] == [None, 2]
    assert [numbers(record) for record in records(again)] == [numbers(record) for record in records(whole)]
    assert weights(again, file) == weights(whole, file)
    # The first was measured before training, by the whole run alone.
    assert [record["step"] for record in records(whole, "validation")] == [0, 1, 2, 3, 4]
    losses = [[record["loss"] for record in records(folder, "validation")] for folder in (whole, again)]
    assert losses[0] == losses[1]


OPTIMIZERS = {
    "adafactor": ["optimizer=adafactor"],
    "muon": ["optimizer=muon"],
    "muon, sharded": ["optimizer=muon", "launch.nproc_per_node=2", "distributed=fsdp2"],
    "8 bits": ["optimizer=adamw_8bit"],
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_continues_to_the_last_bit(tmp_path, name):
    if name == "8 bits":
        pytest.importorskip("bitsandbytes")
    argv = [*FAST, *OPTIMIZERS[name], "step_scheduler.max_steps=4", "step_scheduler.ckpt_every_steps=2"]
    whole = tmp_path / "whole"
    run(*argv, f"output_dir={whole}")
    again = cut_back(whole, tmp_path / "again", to_step=2)
    run(*argv, f"output_dir={again}")
    assert [numbers(record) for record in records(again)] == [numbers(record) for record in records(whole)]
    assert weights(again) == weights(whole)


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
    assert f"step_00000004 is skipped: {checkpoints}/latest names step_00000002" in output
    assert "at step 2" in output


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of 3 steps that saved at each."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(*THREE, f"output_dir={folder}")
    return folder


THREE = [*FAST, "step_scheduler.max_steps=3", "step_scheduler.ckpt_every_steps=1", "optimizer.lr=1e-3",
         "lr_scheduler=constant", "lr_scheduler.warmup_ratio=0"]  # fmt: skip


def test_a_changed_rate_is_used_told_and_written_down(finished, tmp_path):
    again = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    output = run(*THREE, "step_scheduler.max_steps=4", "optimizer.lr=1e-5", "optimizer.weight_decay=0.5",
                 f"output_dir={again}")  # fmt: skip
    assert "optimizer.lr is now 1e-05, and was 0.001; used from step 4 on" in output
    assert "optimizer.weight_decay is now 0.5, and was 0.1; used from step 4 on" in output
    assert [record["lr"] for record in records(again)] == [1e-3, 1e-3, 1e-3, 1e-5]
    assert "lr: 1.0e-05\n" in (again / "config.yaml").read_text()
    assert "optimizer.lr is now 1e-05" in (again / "train.log").read_text()


def test_a_finished_run_is_never_taken_for_another(finished, tmp_path):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    output = run(*THREE, "optimizer.lr=1e-4", "rng.seed=7", f"output_dir={finished}", status=2)
    assert "error: rng.seed is 7, but the checkpoint" in output
    assert (
        "is finished at step 3, so nothing would be trained with what has changed (optimizer.lr is now 0.0001" in output
    )
    output = run(*THREE, "step_scheduler.max_steps=2", f"output_dir={finished}", status=2)
    assert "num_epochs end the run at step 2, but" in output and "Traceback" not in output
    assert before == {path: path.read_bytes() for path in before}
    assert "nothing to train: step 3 is the last" in run(*THREE, f"output_dir={finished}")


def test_a_finished_run_without_checkpoints_keeps_its_model(tmp_path):
    argv = [*THREE, "checkpoint.enabled=false", f"output_dir={tmp_path}/run"]
    run(*argv)
    output = run(*argv, "optimizer.lr=1e-4", status=2)
    assert "holds a finished run with another configuration (optimizer.lr is now 0.0001, and was 0.001)" in output
    run(*argv, "checkpoint.keep_last=3")  # the same run again


def test_a_run_that_began_at_anothers_checkpoint_continues_from_its_own(finished, tmp_path):
    seed = finished / "checkpoints" / "step_00000002"
    seed = shutil.copytree(seed, tmp_path / "seed")
    argv = [*THREE, f"checkpoint.resume={seed}", f"output_dir={tmp_path}/run"]
    run(*argv, "step_scheduler.max_steps=3")
    shutil.rmtree(seed)
    output = run(*argv, "step_scheduler.max_steps=5")  # as a scheduler starts it again
    own = tmp_path / "run" / "checkpoints" / "step_00000003"
    assert (
        f"checkpoint.resume={seed} is where the run began; it continues from its own newer checkpoint {own}" in output
    )
    assert [record["step"] for record in records(tmp_path / "run")] == [3, 4, 5]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resumed_from_step"] == [2, 3]


def test_by_default_checkpoints_are_saved_on_the_way_by_the_clock_of_one_rank(tmp_path):
    argv = [*FAST, "loss_fn._target_=tests.recipes.faulty_losses.SavedAtOnce", "step_scheduler.max_steps=3",
            "checkpoint.keep_last=null", "launch.nproc_per_node=2", "distributed=fsdp2",
            f"output_dir={tmp_path}/run"]  # fmt: skip
    assert "1, and every minute or so" in run(*argv)
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert saved == ["step_00000001", "step_00000002", "step_00000003"]


@pytest.mark.parametrize("num_rows", [12, 16], ids=["short last batch", "full last batch"])
def test_a_stream_that_came_to_its_end_is_finished(stories, tmp_path, num_rows):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Once", "completion": "upon a time"}\n' * num_rows)
    argv = ["model=hf", f"model.pretrained_model_name_or_path={stories}", "dataset=jsonl", f"dataset.path={rows}",
            "dataset.streaming=true", "step_scheduler.max_steps=9", f"output_dir={tmp_path}/run"]  # fmt: skip
    assert "the rows end before step_scheduler.max_steps=9" in run(*argv)
    assert "nothing to train: step 2 is the last" in run(*argv)
