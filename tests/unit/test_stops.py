"""Generation stops at what training supervises as an end."""

import logging
from types import SimpleNamespace

import pytest

from automodel.data.chat.stops import Stops
from automodel.data.sources import FileDataset
from automodel.models.hf import stop_at
from tests.unit.rows import load_sft


@pytest.fixture(scope="module")
def minimind(shared_data):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "templates" / "tok_minimind")


def stops_of(shared_data, tokenizer, template, rows="cases/eos-of-template/rows.jsonl", **options):
    source = FileDataset(path=str(shared_data / rows), chat_template=template, limit=4, **options)
    return load_sft(source, tokenizer, model_max_length=None)


def test_end_of_turn_is_a_token_or_a_text(shared_data, minimind):
    from transformers import GPT2Tokenizer

    (end,) = minimind.convert_tokens_to_ids(["<|im_end|>"])
    assert stops_of(shared_data, minimind, "chatml").stops == Stops(frozenset([end]))
    folder = shared_data / "templates"
    gpt2 = GPT2Tokenizer(str(folder / "tok_gpt2" / "vocab.json"), str(folder / "tok_gpt2" / "merges.txt"))
    prepared = stops_of(shared_data, gpt2, str(folder / "axolotl_chatml.jinja"))
    assert prepared.stops == Stops(texts=frozenset(["<|im_end|>"]))
    assert prepared.prompts[0].answer == "red"
    assert prepared.stops.cut("red<|im_end|>\nand so on<|im_end|>") == "red"


def test_ends_that_are_cut_off_are_none(shared_data, minimind):
    prepared = stops_of(shared_data, minimind, "chatml", max_length=24)
    assert not prepared.stops.ids or prepared.stats.has_end.any()
    short = stops_of(shared_data, minimind, "chatml", rows="chat/v1_sft_demo.jsonl", max_length=40)
    assert bool(short.stops.ids) == bool(short.stats.has_end.any())


@pytest.mark.parametrize(("own", "expected"), [(0, [0, 2]), ([0, 1], [0, 1, 2]), (None, [0, 2]), (2, 2)])
def test_settings_of_generation_list_the_models_own_ends_and_those_trained(minimind, caplog, own, expected):
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    tokenizer = SimpleNamespace(eos_token_id=0, convert_ids_to_tokens=minimind.convert_ids_to_tokens)
    with caplog.at_level(logging.INFO, logger="automodel"):
        stop_at(model, tokenizer, [2])
        stop_at(model, tokenizer, [2])
    assert model.generation_config.eos_token_id == expected
    assert caplog.text.count("generation stops at <|im_end|>") == (own != 2)
