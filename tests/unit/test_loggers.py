"""Weights & Biases where nobody is logged in."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from automodel.loggers.fanout import open_loggers
from automodel.loggers.rundir import RunDir
from automodel.loggers.wandb import WandbLogger


@pytest.fixture
def nobody_logged_in(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def history(folder: Path) -> list[dict[str, float]]:
    """Read the records of an offline run: protocol buffers in a LevelDB log of one block."""
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data = file.read_bytes()
    assert len(data) < 32768  # one block, so that every record is whole
    rows, at = [], 7  # behind the file's header
    while at + 7 <= len(data):
        _, length, _ = struct.unpack_from("<IHB", data, at)
        record = wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        if record.WhichOneof("record_type") == "history":
            rows.append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item})
    return rows


def test_wandb_is_offline_where_nobody_is_logged_in_and_keeps_our_steps(tmp_path, nobody_logged_in, capfd):
    run_dir = RunDir.open(tmp_path / "run")
    sink = open_loggers({"wandb": WandbLogger()}, run_dir, run_id="some-id", config={"a": 1}, is_main=True)
    sink.log({"kind": "train", "step": 20, "loss": 1.5, "timestamp": 0.0})
    sink.log({"kind": "validation", "name": "held-out", "step": 20, "loss": 2.5, "metric/exact_match": 0.25})
    sink.log({"kind": "train", "step": 40, "loss": None})
    sink.close()
    ours = [{key: value for key, value in row.items() if not key.startswith("_")} for row in history(run_dir.path)]
    assert ours == [
        {"step": 20, "train/loss": 1.5},
        {"step": 20, "validation/held-out/loss": 2.5, "validation/held-out/metric/exact_match": 0.25},
        {"step": 40, "train/loss": None},
    ]
    assert capfd.readouterr().err == ""  # wandb itself says nothing
