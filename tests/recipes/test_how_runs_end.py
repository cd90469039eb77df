"""How runs end: done, stopped, failed or refused, with the status and the words that belong to it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.recipes.command import FAST, ROOT, command_line, numbers, records, run, start, wait_for_steps

LOSSES = "loss_fn._target_=tests.recipes.faulty_losses."


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of 8 steps that kept its checkpoints of steps 3, 6 and 8."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    command_line(*FAST, "step_scheduler.max_steps=8", "step_scheduler.ckpt_every_steps=3", "checkpoint.keep_last=null",
        f"output_dir={folder}")  # fmt: skip
    return folder


def test_a_resumed_run_equals_the_one_never_stopped(whole, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(whole, again, symlinks=True)
    for late in ("step_00000006", "step_00000008"):
        shutil.rmtree(again / "checkpoints" / late)
    run(*FAST, "step_scheduler.max_steps=8", "step_scheduler.ckpt_every_steps=3", f"output_dir={again}")
    assert [numbers(r) for r in records(again)] == [numbers(r) for r in records(whole)]
    assert [r["loss"] for r in records(again, "validation")] == [r["loss"] for r in records(whole, "validation")]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, again)]
    assert weights[0] == weights[1]
    before, after = (json.loads((folder / "run.json").read_text()) for folder in (whole, again))
    assert after["resumed_from_step"] == [None, 3]
    assert after["run_id"] == before["run_id"]  # by which W&B knows it as the same run
    assert (again / "checkpoints" / "latest").resolve().name == "step_00000008"
    assert sorted(p.name for p in (again / "checkpoints").glob("step_*")) == ["step_00000006", "step_00000008"]


@pytest.mark.slow
def test_three_ranks_of_ddp_go_on_to_the_last_bit_too(tmp_path):
    # Of more than two ranks the order of a sum counts, and DDP orders its buckets by its first backward.
    argv = [*FAST, "step_scheduler.global_batch_size=24", "launch.nproc_per_node=3", "step_scheduler.max_steps=4",
            "step_scheduler.ckpt_every_steps=2"]  # fmt: skip
    whole, again = tmp_path / "whole", tmp_path / "again"
    run(*argv, f"output_dir={whole}")
    shutil.copytree(whole, again, symlinks=True)
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    run(*argv, f"output_dir={again}")
    assert json.loads((again / "run.json").read_text())["resumed_from_step"] == [None, 2]
    assert [numbers(record) for record in records(again)] == [numbers(record) for record in records(whole)]
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, again)]
    assert weights[0] == weights[1]


def test_a_run_goes_on_in_another_layout(whole, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(whole, again, symlinks=True)
    for late in ("step_00000006", "step_00000008"):
        shutil.rmtree(again / "checkpoints" / late)
    layout = ["launch.nproc_per_node=2", "distributed=fsdp2"]
    run(*FAST, "step_scheduler.max_steps=8", f"output_dir={again}", *layout)
    for one, other in zip(records(whole), records(again), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(whole, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(whole, again, symlinks=True)
    before = {p.name: p.read_bytes() for p in again.iterdir() if p.is_file()}
    argv = [
        *FAST, "step_scheduler.max_steps=9", "step_scheduler.num_epochs=4", "model=scratch",
        f"model.tokenizer_name_or_path={whole}/model",
        "model.config.hidden_size=64", "model.config.intermediate_size=64", "model.config.num_hidden_layers=1",
        "model.config.max_position_embeddings=256", "step_scheduler.global_batch_size=32", "validation_dataset=demo",
    ]  # fmt: skip
    output = run(*argv, f"output_dir={again}", status=2)
    assert "error: model._target_ is automodel.models.hf.ScratchModel, but the checkpoint" in output
    assert "does not fit this model" in run(*argv, f"output_dir={again}", "checkpoint.allow_changes=true", status=2)
    after = {p.name: p.read_bytes() for p in again.iterdir() if p.is_file()}
    assert {k: v for k, v in after.items() if k != ".lock"} == {k: v for k, v in before.items() if k != ".lock"}


def test_a_damaged_checkpoint_is_passed_over(whole, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(whole, again, symlinks=True)
    damaged = next((again / "checkpoints" / "step_00000008").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    output = run(*FAST, "step_scheduler.max_steps=8", f"output_dir={again}")
    assert "step_00000008 is skipped" in output
    assert "resumed from" in output and "step_00000006" in output
    assert [numbers(r) for r in records(again)] == [numbers(r) for r in records(whole)]


def test_other_rows_are_not_resumed_on(whole, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(whole, again, symlinks=True)
    before = (again / "metrics.jsonl").read_bytes()
    output = run(*FAST, "step_scheduler.max_steps=12", "rng.seed=7", f"output_dir={again}", status=2)
    assert "error: rng.seed is 7, but the checkpoint" in output and "Traceback" not in output
    assert (again / "metrics.jsonl").read_bytes() == before


def test_resume_never_refuses_a_folder_that_holds_a_run(whole):
    output = run(*FAST, "checkpoint.resume=never", f"output_dir={whole}", status=2)
    assert "already holds a run and checkpoint.resume=never" in output


@pytest.mark.parametrize(
    "layout",
    [pytest.param([], id="one", marks=pytest.mark.slow),
     pytest.param(["launch.nproc_per_node=2", "distributed=fsdp2"], id="fsdp2 on 2")],
)  # fmt: skip
def test_a_signal_saves_and_ends_with_75_and_the_run_goes_on(tmp_path, layout):
    folder = tmp_path / "run"
    argv = [*FAST, f"{LOSSES}Slow", f"output_dir={folder}", *layout]
    process = start(*argv, "step_scheduler.max_steps=500")
    wait_for_steps(folder, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    *_, words, command = output.splitlines()
    assert words == "to continue:" and shlex.split(command)[1:4] == ["-m", "automodel.run", FAST[0]]
    assert f"output_dir={folder}" in shlex.split(command) and "step_scheduler.max_steps=500" in shlex.split(command)
    stopped_at = len(records(folder))
    assert 2 <= stopped_at < 500
    assert (folder / "checkpoints" / "latest").resolve().name == f"step_{stopped_at:08d}"
    assert json.loads((folder / "run.json").read_text())["ended"]["status"] == "stopped"
    command_line(*argv, f"step_scheduler.max_steps={stopped_at + 2}")
    assert [record["step"] for record in records(folder)] == list(range(1, stopped_at + 3))


@pytest.mark.parametrize(
    "max_steps", [pytest.param(3, id="on the way"), pytest.param(2, id="at the end", marks=pytest.mark.slow)]
)
def test_a_signal_in_an_evaluation_cuts_it_short_and_the_next_start_makes_up_for_it(tmp_path, max_steps):
    argv = [*FAST, f"{LOSSES}AskedToStopInEvaluation", "launch.nproc_per_node=2", "step_scheduler.local_batch_size=2",
            "step_scheduler.val_every_steps=2", f"step_scheduler.max_steps={max_steps}",
            "export.enabled=false"]  # fmt: skip
    whole, again = tmp_path / "whole", tmp_path / "again"
    run(*argv, f"output_dir={whole}")
    output = run(*argv, f"output_dir={again}", status=75, ASK_TO_STOP="1")
    assert "a signal interrupted the evaluation at step 2" in output
    assert [record["step"] for record in records(again)] == [1, 2]
    assert 2 not in [record["step"] for record in records(again, "validation")]
    assert (again / "checkpoints" / "latest").resolve().name == "step_00000002"
    run(*argv, f"output_dir={again}")
    for kind in ("train", "validation"):
        before, after = records(whole, kind), records(again, kind)
        assert [(record["step"], record["loss"]) for record in after] == [(r["step"], r["loss"]) for r in before]


@pytest.mark.slow
def test_a_second_writer_is_refused(tmp_path):
    folder = tmp_path / "run"
    argv = [*FAST, f"{LOSSES}Slow", "step_scheduler.max_steps=200", f"output_dir={folder}"]
    first = start(*argv)
    wait_for_steps(folder, 1)
    output = run(*argv, status=2)
    assert f"error: output_dir={folder} is in use by another run (process" in output
    first.kill()
    first.wait()
    run(*FAST, "step_scheduler.max_steps=1", f"output_dir={folder}")  # the lock went with the process


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(small_disk):
    disk = small_disk("8m")
    argv = [*FAST, "step_scheduler.max_steps=4", "step_scheduler.ckpt_every_steps=1", f"output_dir={disk}/run"]
    output = run(*argv, "checkpoint.keep_last=null", status=1)
    assert "step_00000002 could not be written: it takes about" in output and "MiB are free on its disk" in output
    assert (disk / "run" / "checkpoints" / "latest").resolve().name == "step_00000001"
    assert not list((disk / "run" / "checkpoints").glob(".*.partial"))
    output = run(*argv, "step_scheduler.ckpt_every_steps=9", "checkpoint.enabled=false", "export.enabled=false")
    assert "resumed from" in output and "at step 1" in output


@pytest.mark.slow
def test_workers_die_with_their_launcher(tmp_path):
    folder = tmp_path / "run"
    process = start(
        *FAST, f"{LOSSES}Slow", "step_scheduler.max_steps=500", "launch.nproc_per_node=2", f"output_dir={folder}"
    )
    wait_for_steps(folder, 1)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30  # they would run for minutes
    while alive := [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in _read(p)]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def test_a_run_whose_rank_was_killed_comes_back_by_itself_and_goes_on(whole, tmp_path):
    folder = tmp_path / "run"
    command_line(
        *FAST, f"{LOSSES}Killed", "launch.nproc_per_node=2", "launch.max_restarts=1", "step_scheduler.max_steps=8",
        "step_scheduler.local_batch_size=16", "step_scheduler.ckpt_every_steps=3", f"output_dir={folder}",
    )  # fmt: skip
    first, second = json.loads((folder / "run.json").read_text())["resumed_from_step"]
    assert first is None and second in (3, 6)  # that of step 6 may not be whole yet at the eighth
    for one, other in zip(records(whole), records(folder), strict=True):
        assert numbers(other) == pytest.approx(numbers(one), rel=1e-5)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_its_batch(tmp_path):
    folder = tmp_path / "run"
    output = run(
        *FAST,
        f"{LOSSES}NanAtThirdCall",
        "step_scheduler.local_batch_size=32",
        "step_scheduler.max_steps=5",
        f"output_dir={folder}",
        status=1,
    )
    assert "step 3: loss sum nan" in output and "no weight was changed" in output
    assert "to continue" not in output  # there is no checkpoint
    assert (folder / "non_finite_step_3_rank_0.pt").is_file()
    assert json.loads((folder / "run.json").read_text())["ended"]["status"] == "failed"


def test_a_loss_that_is_not_finite_can_be_skipped(tmp_path):
    folder = tmp_path / "run"
    output = run(
        *FAST, f"{LOSSES}NanAtThirdCall", "step_scheduler.local_batch_size=32", "step_scheduler.max_steps=5",
        "on_non_finite=skip", f"output_dir={folder}",
    )  # fmt: skip
    assert "on_non_finite=skip" in output
    assert [record["loss"] is None for record in records(folder)] == [False, False, True, False, False]


BAD_ROWS = {
    "not JSON": ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "rows.jsonl:2: not JSON"),
    "no field": ('{"prompt": "a", "completion": "b"}\n\n{"prompt": "c"}\n', 'rows.jsonl:3: no field "completion"'),
    "unknown fields": ('{"x": "a", "y": "b"}\n', "rows.jsonl:1: the fields: x, y are of no known format"),
    "null answer": ('{"prompt": "a", "completion": null}\n', 'rows.jsonl:1: the field "completion" must be text'),
    "blank lines only": ("\n\n", "holds no rows"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named_and_leave_nothing_behind(tmp_path, name):
    text, message = BAD_ROWS[name]
    (tmp_path / "rows.jsonl").write_text(text)
    output = run("dataset=jsonl", f"dataset.path={tmp_path}/rows.jsonl", f"output_dir={tmp_path}/deep/run", status=2)
    assert message in output and "Traceback" not in output
    assert not (tmp_path / "deep").exists()


def test_bad_rows_are_told_once_by_several_ranks(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": 1, "completion": "c"}\n')
    output = command_line(
        "dataset=jsonl", f"dataset.path={tmp_path}/rows.jsonl", f"output_dir={tmp_path}/run",
        "launch.nproc_per_node=2", "step_scheduler.global_batch_size=2", status=2,
    )  # fmt: skip
    assert output.count('rows.jsonl:1: the field "prompt" must be text, not a number') == 1
    assert not (tmp_path / "run").exists()


def test_a_model_folder_without_the_right_weights_is_refused(tmp_path, stories):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(stories, tmp_path / "model", copy_function=shutil.copyfile)
    weights = load_file(stories / "model.safetensors")
    name = sorted(weights)[-1]
    save_file({k: v for k, v in weights.items() if k != name} | {"stray": torch.zeros(1)},
              tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    output = run("model=hf", f"model.pretrained_model_name_or_path={tmp_path}/model", f"output_dir={tmp_path}/run",
                 status=2)  # fmt: skip
    assert f"1 weights are missing from the checkpoint, such as {name}" in output
    assert "1 weights are unknown to the model, such as stray" in output
    assert not (tmp_path / "run").exists()


def test_more_ranks_than_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    argv = ["dataset=jsonl", f"dataset.path={tmp_path}/rows.jsonl", "step_scheduler.global_batch_size=2",
            "validation_dataset=jsonl", f"validation_dataset.path={tmp_path}/rows.jsonl"]  # fmt: skip
    run(*argv, f"output_dir={tmp_path}/two", "launch.nproc_per_node=2", "distributed=fsdp2")
    run(*argv, f"output_dir={tmp_path}/one")
    for kind in ("train", "validation"):
        for one, two in zip(records(tmp_path / "one", kind), records(tmp_path / "two", kind), strict=True):
            assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert two["num_label_tokens"] == one["num_label_tokens"]


def test_a_sweep_gives_every_job_a_run_of_its_own_and_ends_with_a_table(tmp_path):
    """The first job fails in training, and the second one runs all the same."""
    output = command_line("-m", *FAST, "step_scheduler.max_steps=3", "optimizer.lr=1e36,1e-3", cwd=tmp_path, status=1)
    assert [p.name for p in tmp_path.iterdir()] == ["outputs"]
    failed, done = sorted((tmp_path / "outputs" / "llm_sft").iterdir())
    assert (len(records(failed)), len(records(done))) == (1, 3)
    assert "a sweep of 2 jobs:\n  optimizer.lr=1e+36\n  optimizer.lr=0.001\n" in output
    table = output[output.rindex("┏") :].replace("\n", "")
    assert "failed (1)" in table and f"{records(done)[-1]['loss']:.4f}" in table


def test_a_saved_configuration_repeats_the_run(whole, tmp_path):
    run("--config-path", str(whole.resolve()), "--config-name", "config", f"output_dir={tmp_path}/again")
    assert [numbers(r) for r in records(tmp_path / "again")] == [numbers(r) for r in records(whole)]


def test_cfg_job_shows_the_configuration_and_runs_nothing(tmp_path):
    output = command_line("--cfg", "job", "step_scheduler.max_steps=3", cwd=tmp_path)
    assert "max_steps: 3" in output
    assert list(tmp_path.iterdir()) == []


def test_wandb_is_kept_offline_and_a_broken_logger_stops_nothing(tmp_path):
    env = {"WANDB_API_KEY": "", "HOME": str(tmp_path), "WANDB_MODE": "offline"}
    output = run(*FAST, "step_scheduler.max_steps=2", "logger=[jsonl,wandb]", f"output_dir={tmp_path}/run", **env)
    assert f"wandb sync {tmp_path}/run/wandb/offline-run-*" in output
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    output = run(*FAST, "step_scheduler.max_steps=2", "logger=[jsonl,wandb]", f"output_dir={tmp_path}/broken",
                 **env | {"WANDB_DIR": "/proc/none", "WANDB_MODE": "no-such-mode"})  # fmt: skip
    assert "logger wandb failed and is left out from now on" in output
    assert len(records(tmp_path / "broken")) == 2


@pytest.mark.slow
def test_under_torchrun_the_job_is_joined(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "automodel.run",
         *FAST, "step_scheduler.max_steps=2", f"output_dir={tmp_path}/run"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 2
