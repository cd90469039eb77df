"""Runs that are killed and go on, and what becomes of their checkpoints."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from automodel.proofs.resume import different_files, first_difference
from automodel.verify_resume import main
from tests.recipes.command import FAST, ROOT, records, run

LOSSES = "loss_fn._target_=tests.recipes.faulty_losses."


def verify(*argv: str, status: int, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "automodel", "verify-resume", *FAST, *argv], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env}, timeout=540, check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == status, f"ended with {done.returncode} instead of {status}:\n{output}"
    return output


@pytest.mark.slow
@pytest.mark.timeout(600)  # starts two ranks four times
def test_a_run_that_loses_a_worker_and_is_killed_in_a_save_comes_to_the_same_end(tmp_path):
    # With this seed, one worker is killed, and then all processes while they write a checkpoint. Every step is saved:
    # where the moment of one save is missed, there are others.
    output = verify(
        "launch.nproc_per_node=2", "verify.kills=2", "verify.seed=193", "verify.num_steps=8", f"{LOSSES}Slow",
        "step_scheduler.val_every_steps=4", "step_scheduler.local_batch_size=16", "step_scheduler.ckpt_every_steps=1",
        status=0,
        TMPDIR=str(tmp_path), AUTOMODEL_RUN_ID="of-another-run",
    )  # fmt: skip
    assert re.search(r"^KILL of all +while writing step_0000000\d +-9 +\S.* yes$", output, re.MULTILINE)
    assert re.search(r"^KILL of one worker +after step \d +1 +\S.* yes$", output, re.MULTILINE), output
    assert "passed: 10 lines of metrics and the weights after step 8 are the same" in output
    assert not list(tmp_path.glob("automodel-*"))


def test_what_a_checkpoint_does_not_hold_is_found():
    output = verify("verify.kills=1", "verify.seed=11", "verify.num_steps=8", f"{LOSSES}GrowsWithEveryCall",
                    "step_scheduler.local_batch_size=32", status=1)  # fmt: skip
    assert re.search(r"^KILL +after step \d +-9 +step \d +NO$", output, re.MULTILINE), output
    assert re.search(r"^  metrics: line \d, step \d: (loss|grad_norm) is \S+ instead of \S+$", output, re.MULTILINE)
    assert "weights: model.safetensors is not the same" in output


def test_everything_wrong_with_a_verification_is_told_at_once(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(["verify.kill=3", "verify.kills=0", "verify.seed=x", "rng.seed=y"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: verify.kills=0 must be at least 1",
        "error: verify.seed=x must be a whole number",
        "error: verify.kill is not a known key; did you mean verify.kills?",
        "error: rng.seed=y must be a whole number",
    ]


def test_lines_and_files_are_compared_exactly(tmp_path):
    line = {"kind": "train", "step": 1, "loss": 0.1}
    assert first_difference([line], [dict(line)]) is None
    assert "loss is 0.10000000000000002 instead of 0.1" in first_difference([line], [line | {"loss": 0.1 + 2**-56}])
    assert first_difference([line, line], [line]) == "there are 1 lines instead of 2"
    for name, content in (("a", b"1"), ("b", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    assert different_files(tmp_path / "a", tmp_path / "a") == []
    assert different_files(tmp_path / "a", tmp_path / "b") == ["weights: model.safetensors is not the same"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A run of 6 steps that validates and saves at every one."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    run(*FAST, "step_scheduler.max_steps=6", "step_scheduler.ckpt_every_steps=1", "step_scheduler.val_every_steps=1",
        "checkpoint.keep_last=1", "checkpoint.keep_every=4", "checkpoint.keep_best=max:loss",
        f"output_dir={folder}")  # fmt: skip
    return folder


def test_the_newest_the_best_and_every_so_many_stay(kept):
    losses = {record["step"]: record["loss"] for record in records(kept, "validation")}
    best = max(losses, key=losses.get)
    steps = {int(path.name[5:]) for path in (kept / "checkpoints").glob("step_*")}
    assert steps == {4, 6, best} and len(steps) == 3
    assert list((kept / "checkpoints").glob(".*")) == []


def test_changes_can_be_allowed_and_a_later_end_is_told(kept, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(kept, again, symlinks=True)
    argv = [*FAST, "step_scheduler.max_steps=8", "rng.seed=7", f"output_dir={again}"]
    assert "checkpoint.allow_changes=true" in run(*argv, status=2)
    output = run(*argv, "checkpoint.allow_changes=true", "checkpoint.async_save=false")
    assert "checkpoint.allow_changes=true: rng.seed is 7, but the checkpoint" in output
    told = re.search(r"now ends at step 8 instead of 6; .* (\S+) at step 7", output)
    assert float(told[1]) == pytest.approx(records(again)[6]["lr"], rel=1e-3) and float(told[1]) > 0
    assert [record["step"] for record in records(again)] == list(range(1, 9))


def test_too_little_room_is_told_before_training(small_disk):
    disk = small_disk("3m")
    output = run(*FAST, "step_scheduler.max_steps=2", f"output_dir={disk}/run", "checkpoint.on_error=continue",
                 status=1)  # fmt: skip
    warning, plan = output.index("a checkpoint takes about 4 MiB, but"), output.index("the plan")
    assert warning < plan
    assert "step_00000002 could not be written: it takes about 4 MiB, but" in output
    assert (disk / "run" / "model" / "model.safetensors").exists()  # trained all the same
