"""A checkpoint from somebody else runs nothing: it is refused, or passed over."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from automodel.checkpoint.manifest import _size_and_checksum, damage
from automodel.checkpoint.retention import Retention
from automodel.checkpoint.training import Checkpointer, SaveError, newest_checkpoint, require_whole
from automodel.checkpoint.unpickling import hidden_code, plain
from automodel.export import main
from automodel.types import UserError
from tests.dist.test_background_saves import Training
from tests.recipes.command import FAST, run


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch '{self.trace}'",))


def _change_metadata(folder: Path, change: Callable[[Metadata], Any]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(metadata) or metadata))


def _put_entry(folder: Path, name: str, content: bytes) -> None:
    """Give the entry ``name`` a content of one's own, behind what its file holds."""

    def change(metadata: Metadata) -> None:
        place = metadata.storage_data[MetadataIndex(name)]
        file = folder / place.relative_path
        place.offset, place.length = file.stat().st_size, len(content)
        file.write_bytes(file.read_bytes() + content)

    _change_metadata(folder, change)


def _entry_of_the_optimizer(folder: Path) -> str:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    kinds = metadata.state_dict_metadata.items()
    return min(name for name, kind in kinds if isinstance(kind, BytesStorageMetadata) and name.startswith("optimizer."))


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _outside(metadata: Metadata) -> None:
    next(iter(metadata.storage_data.values())).relative_path = "../../../../etc/passwd"


HOSTILE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "metadata": (
        lambda folder, trace: _change_metadata(folder, lambda _: Hostile(trace)),
        "its .metadata is not that of a checkpoint, and is not loaded: UnpicklingError: it names posix.system",
    ),
    "deep in the metadata": (
        lambda folder, trace: _change_metadata(folder, lambda found: setattr(found, "planner_data", [Hostile(trace)])),
        "it names posix.system",
    ),
    "a file outside": (
        lambda folder, trace: _change_metadata(folder, _outside),
        "it names ../../../../etc/passwd, a file outside of the checkpoint",
    ),
    "no metadata at all": (
        lambda folder, trace: _change_metadata(folder, lambda _: {"a": 1}),
        "it is not the metadata of a checkpoint",
    ),
    "an entry": (
        lambda folder, trace: _put_entry(folder, _entry_of_the_optimizer(folder), _saved(Hostile(trace))),
        " is not plain data, and is not loaded: it names posix.system",
    ),
    "random states": (
        lambda folder, trace: _put_entry(folder, "rng_0", _saved(Hostile(trace))),
        "its entry rng_0 is not plain data, and is not loaded: it names posix.system",
    ),
    "a bare pickle": (
        lambda folder, trace: _put_entry(folder, "rng_0", pickle.dumps(Hostile(trace), protocol=2)),
        "its entry rng_0 is not plain data, and is not loaded: it names posix.system",
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "run"
    run(*FAST, "step_scheduler.max_steps=2", "step_scheduler.ckpt_every_steps=1", f"output_dir={folder}")
    return folder


def spoiled(good: Path, place: Path, spoil: Callable[[Path, Path], None]) -> tuple[Path, Path]:
    """Return a run whose last checkpoint is hostile but whole, and the file that it makes if it is unpickled."""
    shutil.copytree(good, place / "run", symlinks=True)
    checkpoint, trace = place / "run" / "checkpoints" / "step_00000002", place / "executed"
    spoil(checkpoint, trace)
    entries = json.loads((checkpoint / "manifest.json").read_text())
    entries = {name: _size_and_checksum(checkpoint / name) for name in entries}
    (checkpoint / "manifest.json").write_text(json.dumps(entries))
    return checkpoint, trace


def told_by(action: Callable[[Path], Any], path: str) -> str:
    try:
        return str(action(Path(path)))
    except UserError as error:
        return f"UserError: {error}"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(good, one_rank, tmp_path, capsys, name):
    spoil, words = HOSTILE[name]
    checkpoint, trace = spoiled(good, tmp_path, spoil)
    assert damage(checkpoint) is None
    with pytest.raises(SystemExit) as left:
        main([str(checkpoint), str(tmp_path / "out")])
    told = capsys.readouterr().err
    assert left.value.code == 2 and words in told and "Traceback" not in told
    (told,) = one_rank.run(told_by, require_whole, str(checkpoint))
    assert told.startswith(f"UserError: checkpoint.resume={checkpoint}: ") and words in told
    (found,) = one_rank.run(told_by, newest_checkpoint, str(checkpoint.parent))
    assert found == str(checkpoint.with_name("step_00000001"))  # the hostile one is passed over
    assert not trace.exists() and not (tmp_path / "out").exists()


def test_a_run_refuses_a_hostile_checkpoint_with_status_2(good, tmp_path):
    spoil, words = HOSTILE["deep in the metadata"]
    checkpoint, trace = spoiled(good, tmp_path, spoil)
    argv = [*FAST, "step_scheduler.max_steps=3", f"output_dir={tmp_path / 'new'}", f"checkpoint.resume={checkpoint}"]
    told = run(*argv, status=2)
    assert words in told and "Traceback" not in told and not trace.exists()


def test_random_states_of_an_older_version_are_told_in_a_line(good, tmp_path):
    checkpoint, _ = spoiled(
        good, tmp_path, lambda folder, _: _put_entry(folder, "rng_0", _saved(pickle.dumps({"python": 1})))
    )
    argv = [*FAST, "step_scheduler.max_steps=3", f"output_dir={tmp_path / 'new'}", f"checkpoint.resume={checkpoint}"]
    told = run(*argv, status=2)
    assert "was written by an older version, with random states in a pickle" in told and "Traceback" not in told


def save_one(strategy: str, folder: str) -> None:
    training = Training(strategy)
    training.step()
    Checkpointer(Path(folder), retention=Retention()).save(training.state, progress={"step": 1}, rng={"python": [3]})


@pytest.mark.parametrize("strategy", ["fsdp2", "hsdp", "tp2", "zero3"])
def test_what_every_strategy_saves_is_let_through(two_ranks, four_ranks, tmp_path, strategy):
    (four_ranks if strategy == "hsdp" else two_ranks).run(save_one, strategy, str(tmp_path))
    assert hidden_code(tmp_path / "step_00000001") is None


class Unplain:
    pass


def save_unplain(folder: str) -> str:
    training = Training("ddp")
    training.optimizer.param_groups[0]["mine"] = Unplain()
    try:
        Checkpointer(Path(folder), retention=Retention()).save(training.state, progress={"step": 1}, rng={})
    except SaveError as error:
        return str(error)
    return "saved"


def test_a_state_that_could_not_be_loaded_is_not_saved(one_rank, tmp_path):
    (told,) = one_rank.run(save_unplain, str(tmp_path))
    assert ".mine has type tests.dist.test_foreign_checkpoints.Unplain, but a checkpoint can hold only tensors" in told


def test_numbers_of_numpy_are_saved_as_numbers():
    import numpy as np

    state = plain({"lr_scheduler": {"_last_lr": [np.float64(0.1)], "n": np.int64(3), "betas": (0.9, np.float32(0.5))}})
    assert state == {"lr_scheduler": {"_last_lr": [0.1], "n": 3, "betas": (0.9, 0.5)}}
    assert type(state["lr_scheduler"]["_last_lr"][0]) is float and type(state["lr_scheduler"]["n"]) is int
