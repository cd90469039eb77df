"""The sections of the dataset group: their keys, and that naming them imports nothing heavy."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import pyarrow
import pytest
import yaml
from pyarrow import parquet

from automodel.data.sources import DemoDataset, FileDataset, HFDataset
from automodel.data.validation_share import split_off
from automodel.models.char_tokenizer import build_char_tokenizer
from automodel.types import UserError
from tests.unit.rows import load_classification, load_sft

CONF = Path(__file__).parents[2] / "conf" / "dataset"


def test_sections_import_no_heavy_library():
    code = (
        "import sys, automodel.data.sources\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=CONF.parents[1], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(("option", "source"), [("demo", DemoDataset), ("jsonl", FileDataset), ("hf", HFDataset)])
def test_keys_and_defaults_are_those_of_the_shipped_section(option, source):
    section = yaml.safe_load((CONF / f"{option}.yaml").read_text(encoding="utf-8"))
    assert section.pop("_target_") == f"{source.__module__}.{source.__qualname__}"
    assert set(section) == {field.name for field in dataclasses.fields(source)}
    for field in dataclasses.fields(source):
        if section[field.name] == "???":
            assert field.default is dataclasses.MISSING
        elif field.name == "columns":
            assert not any(section["columns"].values())
        else:
            made = field.default_factory
            assert (field.default if made is dataclasses.MISSING else made()) == section[field.name]


@pytest.fixture
def hub_cache(tmp_path_factory, monkeypatch):
    """A cache of the hub's data sets that the test leaves nothing in."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.usefixtures("hub_cache")
def test_hub_rows_are_read_from_a_local_folder_and_may_hold_dates(tmp_path):
    rows = {"question": ["a", "c"], "answer": ["b", "d"], "day": [date(2024, 1, 2), date(2024, 1, 3)]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "train.parquet")
    prepared = load_sft(HFDataset(path=str(tmp_path)), build_char_tokenizer(), model_max_length=None)
    assert [(prompt.question, prompt.answer) for prompt in prepared.prompts] == [("a", "b"), ("c", "d")]


@pytest.mark.usefixtures("hub_cache")
def test_hub_set_that_is_not_there_is_a_plain_error(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.path=.*missing cannot be loaded"):
        load_sft(HFDataset(path=str(tmp_path / "missing")), build_char_tokenizer(), model_max_length=None)


@pytest.mark.usefixtures("hub_cache")
def test_row_of_the_hub_is_named_by_its_number(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a", "answer": null}\n')
    with pytest.raises(UserError, match=r'\[train\]:2: the field "answer" must be text, not null'):
        load_sft(HFDataset(path=str(tmp_path)), build_char_tokenizer(), model_max_length=None)


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def parts_of(source, share: float, seed: int = 7) -> list[list[str]]:
    return [[row.fields["prompt"] for row in part.rows()]
            for part in split_off(source, share, seed=seed)]  # fmt: skip


def pairs(numbers: Iterable[int]) -> list[dict]:
    return [{"prompt": f"q{number}", "completion": "a"} for number in numbers]


def test_a_share_is_set_aside_at_random_and_the_rest_is_trained_on(tmp_path):
    source = FileDataset(path=write(tmp_path / "rows.jsonl", pairs(range(200))))
    train, val = parts_of(source, 0.05)
    assert len(val) == 10 and sorted(train + val) == sorted(f"q{number}" for number in range(200))
    assert [len(part) for part in parts_of(source, 0.001)] == [199, 1]
    assert val == parts_of(source, 0.05)[1] != parts_of(source, 0.05, seed=8)[1] and val != train[:10]
    turned = FileDataset(path=write(tmp_path / "turned.jsonl", pairs(reversed(range(200)))))
    assert set(parts_of(turned, 0.05)[1]) == set(val)


def test_rows_that_are_alike_are_set_aside_together(tmp_path):
    source = FileDataset(path=write(tmp_path / "rows.jsonl", pairs([*range(40), *range(40)])))
    train, val = parts_of(source, 0.2)
    assert len(val) == 16 and not set(train) & set(val)


def test_a_share_is_of_the_rows_that_split_and_limit_leave(tmp_path):
    source = FileDataset(path=write(tmp_path / "rows.jsonl", pairs(range(100))), split="train[50:]", limit=20)
    train, val = parts_of(source, 0.25)
    assert (len(train), len(val)) == (15, 5)
    assert {int(name[1:]) for name in train + val} == set(range(50, 70))
    prepared = [load_sft(part, build_char_tokenizer(), model_max_length=None)
                for part in split_off(source, 0.25, seed=7)]  # fmt: skip
    assert [rows.counts.num_rows_read for rows in prepared] == [15, 5]
    assert prepared[0].fingerprint != prepared[1].fingerprint


@pytest.mark.usefixtures("hub_cache")
def test_a_share_may_be_of_csv_parquet_and_hub_rows(tmp_path):
    table = pyarrow.table({"prompt": [f"q{number}" for number in range(40)], "completion": ["a"] * 40})
    parquet.write_table(table, tmp_path / "train.parquet")
    csv = tmp_path / "rows.csv"
    csv.write_text("prompt,completion\n" + "".join(f"q{number},a\n" for number in range(40)))
    sources = [FileDataset(path=str(tmp_path / "train.parquet")), FileDataset(path=str(csv)),
               HFDataset(path=str(tmp_path), split="train[:100%]")]  # fmt: skip
    train, val = parts_of(sources[0], 0.1)
    assert (len(train), len(val)) == (36, 4)
    assert parts_of(sources[1], 0.1) == parts_of(sources[2], 0.1) == [train, val]


def test_a_share_that_leaves_nothing_is_told(tmp_path):
    source = FileDataset(path=write(tmp_path / "rows.jsonl", pairs(range(1))))
    with pytest.raises(UserError, match=r"dataset\.validation_share=0\.5 of 1 rows leaves none to train on"):
        parts_of(source, 0.5)


def test_labels_of_rows_that_are_set_aside_are_known(tmp_path):
    rows = [{"text": f"t{number}", "label": "rare" if number == 3 else "ab"[number % 2]} for number in range(8)]
    source = FileDataset(path=write(tmp_path / "rows.jsonl", rows))
    for seed in range(6):  # in one of them the rare one is set aside
        train, val = split_off(source, 0.25, seed=seed)
        known = load_classification(train, build_char_tokenizer(), model_max_length=None, set_aside=val)
        assert known.task.label_names == ("a", "b", "rare")
        load_classification(val, build_char_tokenizer(), model_max_length=None, known=known)


def test_several_files_are_read_in_the_order_given(tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": "x"}]) for name in "bac"]
    source = FileDataset(path=paths)
    assert [row.fields["prompt"] for row in source.rows()] == ["b", "a", "c"]
    assert source.display_name == f"{paths[0]} and 2 more"
    assert FileDataset(path=paths).identity() != FileDataset(path=paths[:2]).identity()
    with pytest.raises(UserError, match=r"names .*b\.jsonl twice"):
        FileDataset(path=[str(tmp_path), paths[0]]).identity()


def test_what_datasets_puts_beside_rows_is_not_taken_for_rows(tmp_path):
    write(tmp_path / "train.jsonl", pairs(range(2)))
    (tmp_path / "dataset_infos.json").write_text('{"default": {}}')
    assert len(list(FileDataset(path=str(tmp_path)).rows())) == 2
