"""A stream gives the same global batches on any number of ranks, and goes on where it was left."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from automodel.data.batches.collate import CausalLMCollator, PackedCollator
from automodel.data.batches.loader import Loader, TrainLoader
from automodel.data.batches.stream import START, Stream, StreamLoader
from automodel.data.batches.train_set import build_train_set
from automodel.data.formats.choose import choose_for_file
from automodel.data.prepare.load import row_preparer
from automodel.data.sources import FileDataset
from automodel.distributed.runtime.first_rank import node_group
from automodel.models.char_tokenizer import build_char_tokenizer as build_tokenizer
from automodel.tasks.causal_lm import CausalLM
from automodel.types import UserError
from tests.unit.rows import load_sft

NUM_ROWS = 203
BATCH = 12

build_char_tokenizer = functools.cache(build_tokenizer)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Rows whose number can be read from their answer, of different lengths; one is too long for anything."""
    path = tmp_path_factory.mktemp("stream") / "rows.jsonl"
    lines = [{"prompt": "q" * (1 + number % 17), "completion": f"<{number}>"} for number in range(NUM_ROWS)]
    lines[50] = {"prompt": "q" * 500, "completion": "never"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def stream_of(path: Path, *, pack_length: int | None = None, num_epochs: int = 2, **options) -> Stream:
    source = FileDataset(path=str(path), max_length=60, streaming=True, **{"buffer_rows": 40} | options)
    tokenizer, keys = build_char_tokenizer(), source.options(None)
    reader = choose_for_file(source.stream(), keys.format, keys.columns, samples=CausalLM.samples)
    prepare = row_preparer(tokenizer, reader, keys, CausalLM())
    return Stream(
        source, prepare, keys, seed=7, global_batch_size=BATCH, num_epochs=num_epochs, drop_last=False,
        pack_length=pack_length,
    )  # fmt: skip


def numbers_in(batch) -> list[int]:
    """Return the row numbers that the supervised tokens of a batch spell."""
    tokenizer = build_char_tokenizer()
    text = tokenizer.decode(batch["labels"][batch["labels"] != -100].tolist())
    return [int(part.rpartition("<")[2]) for part in text.split(">")[:-1] if part.rpartition("<")[2].isdecimal()]


def make_loader(kind: str, path: Path, *, is_packed: bool, num_workers: int) -> Loader:
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    collate = PackedCollator(0) if is_packed else CausalLMCollator(0)
    pack_length = 60 if is_packed else None
    if kind == "stream":
        group = node_group() if size > 1 else None
        return StreamLoader(
            stream_of(path, pack_length=pack_length), collate=collate, local_batch_size=1, dp_rank=rank, dp_size=size,
            node_group=group, num_workers=num_workers,
        )  # fmt: skip
    prepared = load_sft(FileDataset(path=str(path), max_length=60), build_char_tokenizer(), model_max_length=None)
    train_set = build_train_set({"rows": prepared}, pack_length=pack_length, mixture=None, seed=7)
    return TrainLoader(
        train_set.items, collate=collate, global_batch_size=BATCH, local_batch_size=1, dp_rank=rank, dp_size=size,
        seed=7, num_epochs=2, num_workers=num_workers, lengths=train_set.lengths,
    )  # fmt: skip


def take(kind: str, path: Path, is_packed: bool, num_workers: int, state: dict | None, most: int | None) -> tuple:
    """Return (the row numbers of each step's micro-batches on this rank, the epochs, the place afterwards)."""
    loader = make_loader(kind, path, is_packed=is_packed, num_workers=num_workers)
    if state is not None:
        loader.load_state_dict(json.loads(json.dumps(state)))
    steps, epochs = [], []
    for micro_batches in itertools.islice(loader, most):
        steps.append([numbers_in(batch) for batch in micro_batches])
        epochs.append(loader.epoch)
    return steps, epochs, loader.state_dict()


def joined(told: list[tuple]) -> tuple[list[list[int]], list[int], dict]:
    """Return the sorted rows of every step over all ranks, with the epochs and the place, which must agree."""
    epochs, state = told[0][1:]
    assert all(one[1:] == (epochs, state) for one in told)
    steps = []
    for of_ranks in zip(*(one[0] for one in told), strict=True):
        assert len({len(micro) for micro in of_ranks}) == 1, "ranks differ in micro-batches"
        steps.append(sorted(number for micro in of_ranks for batch in micro for number in batch))
    return steps, epochs, state


@pytest.fixture(scope="module")
def three_ranks():
    from tests.dist.pool import RankPool

    pool = RankPool(3)
    yield pool
    pool.close()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["map-style", "stream"])
def test_reading_rows_draws_nothing_from_the_generator_of_dropout(rows, kind, num_workers):
    before = torch.get_rng_state()
    num_steps = sum(1 for _ in make_loader(kind, rows, is_packed=False, num_workers=num_workers))
    assert num_steps > 2 * (NUM_ROWS // BATCH)  # two epochs, each with an iterator of its own
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("is_packed", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("kind", ["map-style", "stream"])
def test_any_number_of_ranks_takes_the_same_global_batches_and_goes_on_where_another_left(
    ranks, three_ranks, rows, kind, is_packed, num_workers
):
    whole, epochs, _ = joined([take(kind, rows, is_packed, 0, None, None)])
    every_row = sorted(set(range(NUM_ROWS)) - {50})
    for epoch in (0, 1):
        steps = [step for step, of in zip(whole, epochs, strict=True) if of == epoch]
        assert sorted(itertools.chain(*steps)) == every_row
    for pool in (ranks[2], three_ranks, ranks[4]):
        assert joined(pool.run(take, kind, rows, is_packed, num_workers, None, None))[:2] == (whole, epochs)
    num_epoch = epochs.count(0)
    for num_done in (1, num_epoch // 2, num_epoch, num_epoch + 2):
        first, _, state = joined(ranks[2].run(take, kind, rows, is_packed, num_workers, None, num_done))
        assert first == whole[:num_done]
        for pool in (ranks[4], ranks[1]):
            rest, of, _ = joined(pool.run(take, kind, rows, is_packed, num_workers, state, None))
            assert (rest, of) == (whole[num_done:], epochs[num_done:])


def test_a_stream_that_goes_on_reads_one_block_and_not_the_rows_before_it(rows, monkeypatch):
    loader = StreamLoader(stream_of(rows), collate=CausalLMCollator(0), local_batch_size=1, dp_rank=0, dp_size=1)
    list(itertools.islice(loader, 12))
    state = loader.state_dict()
    prepared = []
    stream = stream_of(rows)
    original = stream.prepare
    object.__setattr__(stream, "prepare", lambda fields: prepared.append(fields) or original(fields))
    again = StreamLoader(stream, collate=CausalLMCollator(0), local_batch_size=1, dp_rank=0, dp_size=1)
    again.load_state_dict(state)
    next(iter(again))
    assert state["block"] == 3 and len(prepared) <= 2 * 40
    assert prepared[0]["completion"] == "<120>"


def test_streamed_rows_are_shuffled_within_blocks_and_otherwise_in_another_epoch(rows):
    steps, epochs, _ = joined([take("stream", rows, False, 0, None, None)])
    first = list(itertools.chain(*[step for step, epoch in zip(steps, epochs, strict=True) if not epoch]))
    second = list(itertools.chain(*[step for step, epoch in zip(steps, epochs, strict=True) if epoch]))
    assert first != second and max(first[:36]) < 40


@pytest.mark.parametrize(("limit", "expected"), [(40, 40), (41, 41), (90, 89), (1000, 202)])
def test_a_stream_ends_at_the_limit(rows, limit, expected):
    loader = StreamLoader(
        stream_of(rows, limit=limit, num_epochs=1), collate=CausalLMCollator(0), local_batch_size=12, dp_rank=0,
        dp_size=1,
    )  # fmt: skip
    assert sum(len(numbers_in(batch)) for step in loader for batch in step) == expected
    assert loader.is_exhausted


def test_a_gzipped_stream_and_a_slice_go_on_too(rows, tmp_path):
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(rows.read_bytes()))
    for path, options in ((packed, {}), (rows, {"split": "train[20:90]"})):
        whole = StreamLoader(
            stream_of(path, **options), collate=CausalLMCollator(0), local_batch_size=12, dp_rank=0, dp_size=1
        )
        steps = [[numbers_in(batch) for batch in step] for step in whole]
        begun = StreamLoader(
            stream_of(path, **options), collate=CausalLMCollator(0), local_batch_size=12, dp_rank=0, dp_size=1
        )
        list(itertools.islice(begun, 5))
        rest = StreamLoader(
            stream_of(path, **options), collate=CausalLMCollator(0), local_batch_size=12, dp_rank=0, dp_size=1
        )
        rest.load_state_dict(begun.state_dict())
        assert [[numbers_in(batch) for batch in step] for step in rest] == steps[5:]


def fail(path: Path, num_workers: int) -> tuple[str, str]:
    loader = make_loader("stream", path, is_packed=False, num_workers=num_workers)
    try:
        list(loader)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_row_of_a_stream_ends_every_rank_with_its_line(two_ranks, rows, tmp_path, num_workers):
    lines = rows.read_text().splitlines()
    lines[100] = "{damaged"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    for kind, message in two_ranks.run(fail, path, num_workers):
        assert kind == "UserError" and "rows.jsonl:101: not JSON" in message


def test_fields_that_later_rows_of_a_stream_bring_are_told_once(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": "q", "completion": "a"} | ({"note": "n"} if number > 5 else {}) for number in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    list(stream_of(path, buffer_rows=4).steps(START))
    (told,) = (record.message for record in caplog.records if "fields not used" in record.message)
    assert "fields not used: note (2 of 4 rows)" in told


def test_a_stream_of_nothing_is_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "q" * 100, "completion": "never"}) + "\n")
    loader = StreamLoader(stream_of(path), collate=CausalLMCollator(0), local_batch_size=1, dp_rank=0, dp_size=1)
    with pytest.raises(UserError, match=r"nothing to train on is left within dataset\.max_length=60 tokens"):
        list(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_that_resumes_after_its_remaining_rows_were_removed_is_an_error(rows, tmp_path, num_workers):
    path = tmp_path / "rows.jsonl"
    path.write_text(rows.read_text())
    begun = make_loader("stream", path, is_packed=False, num_workers=0)
    list(itertools.islice(begun, 2 * (NUM_ROWS // BATCH)))  # well into the second epoch
    state = begun.state_dict()
    assert state["epoch"] == 1 and state["block"] == 4
    path.write_text("".join(line + "\n" for line in rows.read_text().splitlines()[:160]))  # up to that block
    resumed = make_loader("stream", path, is_packed=False, num_workers=num_workers)
    resumed.load_state_dict(state)
    with pytest.raises(UserError, match="the rows end before the point where training resumes, so some were removed"):
        next(iter(resumed))
