"""Every file of real rows is recognised, or names the columns that it needs."""

import json
from itertools import islice

import pytest

from automodel.data.formats.choose import UnknownFormat, choose_format
from automodel.data.formats.samples import Messages, PlainText, Preference, PromptCompletion
from automodel.tasks.causal_lm import CausalLM

SHAPES = {
    "alpaca": Messages,
    "messages": Messages,
    "sharegpt": Messages,
    "prompt_completion": PromptCompletion,
    "text": PlainText,
    "preference": Preference,
}
DETECTED = {
    "sft/alpaca": "alpaca",
    "sft/alpaca_en_demo": "alpaca",
    "sft/alpaca_zh_demo": "alpaca",
    "sft/dolly": "alpaca",
    "sft/gsm8k_train": "prompt_completion",
    "sft/gsm8k_test": "prompt_completion",
    "chat/glaive_toolcall_sharegpt": "sharegpt",
    "chat/reason_tool_use": "messages",
    "chat/tau_airline_messages": "messages",
    "chat/v1_sft_demo": "messages",
    "pretrain/c4_demo": "text",
    "pretrain/tinystories": "text",
    "pref/dpo_en_demo": "preference",
    "pref/v1_dpo_demo": "preference",
    "pref/ultrafeedback": "preference",
}
INSTANCES = {"input": "{instances[0][input]}", "output": "{instances[0][output]}"}
MAPPED = {
    "sft/humaneval": ("prompt_completion", {"completion": "canonical_solution"}),
    "sft/self_instruct_user": ("alpaca", INSTANCES),
    "sft/self_instruct_seed": ("alpaca", INSTANCES),
    "qa/squad_train": (
        "prompt_completion",
        {"prompt": "{context}\n\n{question}", "completion": "{answers[text][0]}"},
    ),
    "mcq/hellaswag_train": ("prompt_completion", {"prompt": "ctx", "completion": "{endings[0]}"}),
}


def first_rows(shared_data, name):
    with open(shared_data / f"{name}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, 50)]


@pytest.mark.parametrize("name", DETECTED)
def test_format_is_detected_and_every_row_read(shared_data, name):
    rows = first_rows(shared_data, name)
    samples = (Preference,) if name.startswith("pref") else CausalLM.samples
    chosen = choose_format("auto", {}, row=rows[0], samples=samples)
    assert chosen.name == DETECTED[name]
    assert {type(chosen.read(row)) for row in rows} == {SHAPES[chosen.name]}


@pytest.mark.parametrize("name", MAPPED)
def test_other_layouts_are_read_by_columns_and_refused_without(shared_data, name):
    rows = first_rows(shared_data, name)
    expected, columns = MAPPED[name]
    with pytest.raises(UnknownFormat, match=r"of no known format; name them with dataset\.columns"):
        choose_format("auto", {}, row=rows[0], samples=CausalLM.samples)
    chosen = choose_format("auto", columns, row=rows[0], samples=CausalLM.samples)
    assert chosen.name == expected
    assert {type(chosen.read(row)) for row in rows} == {SHAPES[expected]}


def test_rated_answers_need_the_format_to_be_named(shared_data):
    rows = first_rows(shared_data, "pref/kto_en_demo")
    with pytest.raises(UnknownFormat, match=r"boolean label.*dataset\.format=messages"):
        choose_format("auto", {}, row=rows[0], samples=CausalLM.samples)
    chosen = choose_format("messages", {}, row=rows[0], samples=CausalLM.samples)
    assert all(row["messages"][-1]["content"] == chosen.read(row).turns[-1]["content"] for row in rows)


def test_parts_of_reasoning_and_calls_reach_the_turns(shared_data):
    rows = first_rows(shared_data, "chat/reason_tool_use")
    chosen = choose_format("auto", {}, row=rows[0], samples=CausalLM.samples)
    for row in rows:
        for given, turn in zip(row["messages"], chosen.read(row).turns, strict=True):
            parts = {kind: [p["value"] for p in given["content"] if p["type"] == kind] for kind in PART_KINDS}
            assert turn["content"] == "".join(parts["text"])
            assert turn.get("reasoning_content", "") == "\n".join(parts["reasoning"])
            calls = [call["function"] for call in turn.get("tool_calls", [])]
            wanted = [call for text in parts["tool_call"] for call in as_list(json.loads(text))]
            assert calls == wanted


PART_KINDS = ("reasoning", "text", "tool_call")


def as_list(value):
    return value if isinstance(value, list) else [value]


def test_pairs_of_real_rows_share_their_prompt_and_differ_after_it(shared_data):
    rows = first_rows(shared_data, "pref/ultrafeedback")
    chosen = choose_format("auto", {}, row=rows[0], samples=(Preference,))
    for row in rows:
        pair = chosen.read(row)
        assert [turn["content"] for turn in pair.prompt + pair.chosen] == [turn["content"] for turn in row["chosen"]]
        assert pair.prompt[-1]["role"] == "user"
        assert pair.chosen[0]["role"] == pair.rejected[0]["role"] == "assistant"
