"""The sections of the dataset group: their keys, and that naming them imports nothing heavy."""

import dataclasses
import subprocess
import sys
from datetime import date
from pathlib import Path

import pyarrow
import pytest
import yaml
from pyarrow import parquet

from automodel.data.prepare import load_sft
from automodel.data.sources import DemoDataset, HFDataset, JsonlDataset
from automodel.models.char_tokenizer import build_char_tokenizer
from automodel.types import UserError

CONF = Path(__file__).parents[2] / "conf" / "dataset"


def test_sections_import_no_heavy_library():
    code = (
        "import sys, automodel.data.sources\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=CONF.parents[1], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(("option", "source"), [("demo", DemoDataset), ("jsonl", JsonlDataset), ("hf", HFDataset)])
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
            assert field.default == section[field.name]


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
