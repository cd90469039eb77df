"""Prepared data is built once, is whole or not there, and follows all that decides it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from automodel.data.prepare import writer as build_module
from automodel.data.prepare.cache import build_once, cache_root
from automodel.data.sources import FileDataset
from automodel.models.char_tokenizer import build_char_tokenizer
from automodel.types import UserError
from tests.unit.rows import load_sft


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("AUTOMODEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_cache_stands_where_the_user_wants_it(monkeypatch, tmp_path):
    assert cache_root() == tmp_path / "cache"
    monkeypatch.delenv("AUTOMODEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root() == Path("/x/automodel")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "automodel"


def slowly(log: Path, folder: Path) -> None:
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    (folder / "first").write_text("one")
    time.sleep(1)
    (folder / "second").write_text("two")


def build(log: Path) -> None:
    folder = build_once({"what": 1}, lambda folder: slowly(log, folder))
    assert (folder / "second").read_text() == "two"


def test_two_processes_at_once_build_once(tmp_path):
    log = tmp_path / "log"
    processes = [multiprocessing.Process(target=build, args=(log,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(log.read_text().splitlines()) == 1


def test_a_builder_that_is_killed_leaves_nothing_that_counts(tmp_path):
    log = tmp_path / "log"
    process = multiprocessing.Process(target=build, args=(log,))
    process.start()
    while not log.exists() or not log.read_text():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    build(log)
    assert len(log.read_text().splitlines()) == 2


def test_a_failure_while_building_leaves_nothing(cache):
    with pytest.raises(ZeroDivisionError):
        build_once({"what": 2}, lambda folder: 1 / 0)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def full(folder: Path) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_told(cache):
    with pytest.raises(UserError, match=f"cannot be written to {cache} .No space left on device.; make room"):
        build_once({"what": 3}, full)
    cache.chmod(0o500)
    if os.geteuid():  # root writes everywhere
        with pytest.raises(UserError, match="Permission denied"):
            build_once({"what": 4}, lambda folder: None)


def write(path: Path, *completions: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": "p", "completion": each}) + "\n" for each in completions))
    return path


def load(path: Path, tokenizer=None, **options):
    return load_sft(FileDataset(path=str(path), **options), tokenizer or build_char_tokenizer(), model_max_length=None)


def num_folders(cache: Path) -> int:
    return sum(path.is_dir() for path in cache.iterdir())


def test_the_same_rows_are_prepared_once(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "rows.jsonl", "a", "b")
    first = load(path)
    monkeypatch.setattr("automodel.data.prepare.writer._prepare_row", None)  # nothing is prepared again
    second = load(path)
    assert list(first.examples) == list(second.examples) and first.fingerprint == second.fingerprint
    assert list(first.prompts) == list(second.prompts) and first.counts == second.counts


@pytest.mark.parametrize(
    "options", [{"max_length": 4}, {"limit": 1}, {"truncation": "left"}, {"split": "train[:1]"}, {"supervise": "last"}]
)
def test_every_option_that_changes_rows_has_rows_of_its_own(tmp_path, cache, options):
    path = write(tmp_path / "rows.jsonl", "a", "b")
    load(path)
    load(path, **options)
    assert num_folders(cache) == 2


def test_changed_files_and_tokenizers_are_prepared_anew(tmp_path, cache):
    path = write(tmp_path / "rows.jsonl", "a", "b")
    first = load(path)
    write(path, "a", "c")  # of the same size
    second = load(path)
    assert first.fingerprint != second.fingerprint
    assert second.prompts[1].answer == "c" and first.prompts[1].answer == "b"
    tokenizer = build_char_tokenizer()
    tokenizer.add_tokens(["abc"])
    load(path, tokenizer)
    assert num_folders(cache) == 3


def test_the_fingerprint_is_that_of_the_rows_and_not_of_their_place(tmp_path):
    one, other = write(tmp_path / "one.jsonl", "a", "b"), write(tmp_path / "other.jsonl", "a", "b")
    assert load(one).fingerprint == load(other).fingerprint


def test_the_chat_template_is_set_from_the_cache_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    first, second = build_char_tokenizer(), build_char_tokenizer()
    load(path, first)
    load(path, second)
    assert first.chat_template == second.chat_template is not None


def test_several_processes_prepare_the_same_rows_in_the_same_order(tmp_path):
    rows = write(tmp_path / "rows.jsonl", *(f"answer {number}" for number in range(700)))
    expected, found = load(rows), load(rows, num_proc=2, max_length=2000)
    assert list(found.examples) == list(expected.examples)
    assert found.stats.hashes.tolist() == expected.stats.hashes.tolist()


def test_few_rows_are_read_before_their_results_are_taken(tmp_path, monkeypatch):
    num_read = 0

    class Counted(FileDataset):
        def rows(self, *, samples=()) -> Iterator[Any]:
            nonlocal num_read
            for num_read in range(1, 100_001):
                yield f"place {num_read}", {"number": num_read}

    monkeypatch.setattr(build_module.multiprocessing, "get_context", lambda kind: SimpleNamespace(Pool=ThreadPool))
    source = Counted(path=str(write(tmp_path / "rows.jsonl", "a")), num_proc=2)
    builder = build_module.RowWriter(source, source.options(100), tmp_path, samples=(), columns={})
    prepared = builder._prepared(lambda fields: fields["number"])
    for number, (place, result) in enumerate(islice(prepared, 3000), start=1):
        assert (place, result) == (f"place {number}", number)  # in order
    for _ in range(50):  # a reader of its own would go on meanwhile, to the end of the input
        time.sleep(0.01)
    assert num_read - 3000 <= 2 * 4 * 256
    prepared.close()


def test_damaged_rows_are_skipped_and_counted_where_wanted(tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", "a")
    path.write_text(path.read_text() + '{"prompt": "p"}\n{broken\n' + path.read_text())
    with pytest.raises(UserError, match=r'rows\.jsonl:2: no field "completion".*\n.*rows\.jsonl:3: not JSON'):
        load(path)
    rows = load(path, on_bad_row="skip")
    assert len(rows.examples) == 2 and rows.counts.num_bad == 2
    assert [bad.rpartition("rows.jsonl")[2][:3] for bad in rows.counts.bad_rows] == [":2:", ":3:"]
    assert load(path, on_bad_row="skip").counts.num_bad == 2  # from the cache as well
