"""Weights & Biases where nobody is logged in."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from automodel.loggers.fanout import MetricSink, open_loggers
from automodel.loggers.wandb import WandbLogger, _sent_before
from automodel.runs.run_folder import RunDir


@pytest.fixture
def nobody_logged_in(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def history(folder: Path, num_rows: int) -> list[dict[str, float]]:
    """Return our own rows of all starts of an offline run; wandb's process may still write after a run's finish."""
    for _ in range(100):
        rows = read_rows(folder)
        if len(rows) >= num_rows:
            break
        time.sleep(0.1)
    return rows


def read_rows(folder: Path) -> list[dict[str, float]]:
    """Read what is written by now: protocol buffers in a LevelDB log of one block for each start."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        data, at = file.read_bytes(), 7  # behind the file's header
        assert len(data) < 32768  # one block, so that every record is whole
        while at + 7 <= len(data):
            _, length, _ = struct.unpack_from("<IHB", data, at)
            if at + 7 + length > len(data):
                break
            record = wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + length])
            at += 7 + length
            if record.WhichOneof("record_type") == "history":
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                rows.append({key: value for key, value in row.items() if not key.startswith("_")})
    return rows


def open_wandb(run_dir: RunDir) -> MetricSink:
    return open_loggers({"wandb": WandbLogger()}, run_dir, run_id="some-id", config={"a": 1}, is_main=True)


def test_wandb_is_offline_where_nobody_is_logged_in_and_keeps_our_steps(tmp_path, nobody_logged_in, capfd):
    run_dir = RunDir.open(tmp_path / "run")
    sink = open_wandb(run_dir)
    sink.log({"kind": "train", "step": 20, "loss": 1.5, "timestamp": 0.0})
    sink.log({"kind": "validation", "name": "held-out", "step": 20, "loss": 2.5, "metric/exact_match": 0.25})
    sink.log({"kind": "train", "step": 40, "loss": None})
    sink.close()
    assert history(run_dir.path, 3) == [
        {"step": 20, "train/step": 20, "train/loss": 1.5},
        {
            "step": 20,
            "validation/held-out/step": 20,
            "validation/held-out/loss": 2.5,
            "validation/held-out/metric/exact_match": 0.25,
        },
        {"step": 40, "train/step": 40, "train/loss": None},
    ]
    assert capfd.readouterr().err == ""  # wandb itself says nothing


def test_what_a_killed_run_repeats_is_sent_to_wandb_once(tmp_path, nobody_logged_in):
    run_dir = RunDir.open(tmp_path / "run")
    first = open_wandb(run_dir)
    for step in (1, 2, 3):
        first.log({"kind": "train", "step": step, "loss": float(step)})
    first.close()
    again = open_wandb(run_dir)  # from a checkpoint of step 1, on whose validation the run was killed
    again.log({"kind": "validation", "name": "v", "step": 2, "loss": 9.0})
    for step in (2, 3, 4):
        again.log({"kind": "train", "step": step, "loss": float(step)})
    again.close()
    rows = history(run_dir.path, 5)
    assert [(row["step"], row.get("train/loss")) for row in rows] == [(1, 1.0), (2, 2.0), (3, 3.0), (2, None), (4, 4.0)]
    assert len(list(run_dir.path.glob("wandb/offline-run-*-some-id*"))) == 2  # one id, so that a sync joins them


def test_online_it_is_wandb_that_knows_what_it_has():
    run = SimpleNamespace(resumed=True, summary={"train/step": 55, "validation/v/step": 50, "train/loss": 1.5})
    assert _sent_before(run) == {"train": 55, "validation/v": 50}
    run.resumed = False
    assert _sent_before(run) == {}
