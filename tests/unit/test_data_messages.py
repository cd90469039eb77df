"""Conversations, as OpenAI and ShareGPT lay them out, become turns that chat templates take."""

import json

import pytest

from automodel.data.formats.choose import choose_format
from automodel.data.formats.samples import Messages
from automodel.data.rows import BadRow
from automodel.tasks.causal_lm import CausalLM

USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def read(row):
    return choose_format("auto", {}, row=row, samples=CausalLM.samples).read(row)


def test_messages_join_text_parts_of_either_spelling():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]
    turns = read({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]}).turns
    assert [turn["content"] for turn in turns] == ["ab", "c"]


def test_null_content_is_allowed_for_a_tool_call_alone():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    assert read({"messages": [{"role": "user", "content": "a"}, call]}).turns[1]["content"] == ""
    with pytest.raises(BadRow, match=r"message 2: content.* must be text, not null"):
        read({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]})


@pytest.mark.parametrize("tools", [[{"name": "f"}], '[{"name": "f"}]'])
def test_tools_are_read_as_a_list_or_as_json_text(tools):
    assert read({"messages": [{"role": "assistant", "content": "a"}], "tools": tools}).tools == [
        {"type": "function", "function": {"name": "f"}}
    ]


THOUGHT, TEXT = {"type": "reasoning", "text": "b"}, {"type": "text", "text": "c"}


def calling(name, arguments):
    return {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


CALLED_BY_TEXT = [{"type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}]


CALLING = calling("f", "{}")


CALLED = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (calling("f", '{"x":1}'), {"content": "", "tool_calls": CALLED_BY_TEXT}),
        (
            {"content": [{"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]},
            {"content": "", "tool_calls": CALLED},
        ),
        ({"content": [THOUGHT, TEXT]}, {"content": "c", "reasoning_content": "b"}),
        ({"content": "b", "name": None, "weight": 1.0, "id": "7"}, {"content": "b", "id": "7"}),
    ],
)
def test_assistants_turn_is_brought_to_what_templates_take(turn, expected):
    assert read({"messages": [USER, {"role": "assistant"} | turn]}).turns[1] == {"role": "assistant"} | expected


def test_sharegpt_roles_become_those_of_templates():
    said = [("system", "s"), ("human", "q"), ("function_call", '{"name": "f", "arguments": {"x": 1}}')]
    said += [("observation", "1"), ("gpt", "a")]
    row = {"conversations": [{"from": role, "value": text} for role, text in said], "tools": "[]"}
    assert read(row) == Messages(
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "tool_calls": CALLED},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "a"},
        ]
    )
    assert read({"conversations": [USER, ASSISTANT], "system": "s"}).turns == [
        {"role": "system", "content": "s"}, USER, ASSISTANT
    ]  # fmt: skip
    assert read({"messages": [{"role": "developer", "content": "s"}, ASSISTANT]}).turns[0]["role"] == "system"


def test_weights_are_kept_beside_the_turns():
    row = {"messages": [USER | {"loss_weight": 0.0}, ASSISTANT, USER, ASSISTANT | {"weight": 0.5}]}
    assert read(row) == Messages([USER, ASSISTANT, USER, ASSISTANT], None, [0.0, None, None, 0.5])
    assert read({"messages": [USER, ASSISTANT]}).weights is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": []}, "must be a list of messages that is not empty"),
        ({"messages": "hello"}, 'the field "messages" is text, but not JSON'),
        ({"messages": '"hello"'}, "must be a list of messages"),
        ({"messages": [USER]}, "no message of the assistant"),
        ({"messages": [USER, "b"]}, "message 2 must be an object"),
        ({"messages": [USER, {"role": "bot", "content": "b"}]}, "message 2 has the role 'bot'"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "the assistant's content is empty"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "type 'image' is not supported"),
        ({"messages": [{"role": "user", "content": [THOUGHT]}, ASSISTANT]}, "'reasoning' is the assistant's, not the"),
        ({"messages": [USER, {"role": "assistant", "content": [THOUGHT]}]}, "the assistant's content is empty"),
        ({"messages": [USER, {"role": "assistant", "content": [TEXT, THOUGHT]}]}, "must be in this order"),
        (
            {"messages": [USER, ASSISTANT | {"loss_weight": -1}]},
            "message 2: loss_weight=-1 must be a number that is not",
        ),
        ({"messages": [USER, ASSISTANT | {"weight": "much"}]}, "message 2: weight='much' must be a number"),
        ({"messages": [USER, ASSISTANT | {"train": "perhaps"}]}, "message 2: train='perhaps' must be true or false"),
        ({"messages": [USER, ASSISTANT | {"train": False, "weight": 1}]}, "weight and train differ"),
        ({"messages": [USER, CALLING | {"function_call": {"name": "f"}}]}, "keep one of them"),
        ({"messages": [USER, ASSISTANT | {"weight": 1, "loss_weight": 0.5}]}, "weight and loss_weight differ"),
        ({"messages": [USER | {"tool_calls": [{"name": "f"}]}, ASSISTANT]}, "tool_calls are the assistant's"),
        ({"messages": [USER, ASSISTANT | {"tool_calls": [{"id": "1"}]}]}, "a tool call must have a name"),
        ({"messages": [USER, calling("f", "a")]}, "the arguments of 'f' is text, but not JSON"),
        ({"messages": [USER, calling("f", "[1]")]}, "the arguments of 'f' must be an object"),
        ({"messages": [{"role": "system", "content": "a"}, ASSISTANT], "system": "b"}, "a system field, and a message"),
        ({"conversations": [{"from": "alien", "value": "b"}]}, "message 1 has the role 'alien'"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "message 1: value"),
        ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, "the tool call is text, but not JSON"),
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, '"history" is not supported'),
        ({"text": " "}, 'the field "text" is empty'),
        ({"messages": [USER, ASSISTANT], "tools": "search"}, 'the field "tools" is text, but not JSON'),
        ({"messages": [USER, ASSISTANT], "tools": {"name": "f"}}, 'the field "tools" must be a list of objects'),
        ({"instruction": "", "output": "x"}, 'the field "instruction" is empty'),
    ],
)
def test_what_cannot_be_trained_on_as_it_stands_is_refused(row, expected):
    with pytest.raises(BadRow, match=expected):
        read(row)


@pytest.mark.parametrize(
    ("keys", "weight"),
    [
        ({"train": False}, 0.0),
        ({"train": True}, 1.0),
        ({"training": "false"}, 0.0),
        ({"train": 0}, 0.0),
        ({"train": "No"}, 0.0),
        ({"weight": "0.25"}, 0.25),
        ({"weight": False}, 0.0),
        ({"train": True, "weight": 0.5}, 0.5),
        ({"train": False, "weight": 0}, 0.0),
        ({"train": None, "weight": None}, None),
    ],
)
def test_whether_a_message_is_trained_on_is_read_as_flag_number_or_text(keys, weight):
    assert read({"messages": [USER, ASSISTANT, USER, ASSISTANT | keys | {"weight": keys.get("weight")}]}) == Messages(
        [USER, ASSISTANT, USER, ASSISTANT], None, None if weight is None else [None, None, None, weight]
    )


@pytest.mark.parametrize("call", [{"name": "f", "arguments": {"x": 1}}, '{"name": "f", "arguments": {"x": 1}}'])
def test_function_call_and_functions_are_older_names(call):
    turn = {"role": "assistant", "content": "I look.", "function_call": call}
    schema = {"name": "f", "parameters": {}}
    result = {"role": "function", "name": "f", "content": "3"}
    row = read({"messages": [USER, turn, result, ASSISTANT], "functions": [schema]})
    assert row.turns[1] == {"role": "assistant", "content": "I look.", "tool_calls": CALLED}
    assert row.turns[2] == {"role": "tool", "name": "f", "content": "3"}
    assert row.tools == [{"type": "function", "function": schema}]


def test_nulls_of_objects_are_no_arguments_and_no_keys_of_schemas():
    filled = {"role": "assistant", "content": None, "function_call": {"name": None, "arguments": None}, "from": None}
    filled["tool_calls"] = [{"id": None, "function": {"name": "f", "arguments": {"x": 1, "y": None, "z": {"a": None}}}}]
    schema = {"name": "f", "parameters": {"x": {"enum": [None, 1], "type": None}}, "strict": None}
    row = read({"messages": [USER | {"tool_calls": None}, filled], "tools": [schema]})
    assert row.turns[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "z": {}}
    assert row.tools[0]["function"] == {"name": "f", "parameters": {"x": {"enum": [None, 1]}}}


def test_a_null_in_json_text_is_kept():
    row = read({"messages": [USER, calling("f", '{"x": null}')], "tools": '[{"name": "f", "x": null}]'})
    assert row.turns[1]["tool_calls"][0]["function"]["arguments"] == '{"x": null}'
    assert row.tools[0]["function"] == {"name": "f", "x": None}


def test_messages_may_be_json_text():
    assert read({"messages": json.dumps([USER, ASSISTANT])}) == Messages([USER, ASSISTANT])
