"""The format of a file is recognised from its fields, or asked for."""

import pytest

from automodel.data.formats import Messages, PromptCompletion, TextLabel, UnknownFormat, choose_format
from automodel.data.readers import BadRow


def read(row, *, name="auto", is_classification=False, **columns):
    chosen = choose_format(name, columns, row=row, is_classification=is_classification)
    return chosen.read(row)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "q", "completion": "a"}, {}),
        ({"question": "q", "answer": "a"}, {}),
        ({"question": "q", "answer": "a"}, {"prompt": "question", "completion": "answer"}),
        ({"ask": "q", "completion": "a"}, {"prompt": "ask", "completion": None}),
        ({"prompt": "q", "canonical_solution": "a", "test": "t"}, {"completion": "canonical_solution"}),
    ],
)
def test_prompt_and_completion_are_recognised_under_their_names_and_mapped_ones(row, columns):
    assert read(row, **columns) == PromptCompletion("q", "a", None)


def test_mapping_settles_which_of_two_formats_is_meant():
    row = {"instruction": "i", "output": "o", "prompt": "q", "completion": "a"}
    with pytest.raises(UnknownFormat, match=r"choose dataset\.format=prompt_completion or alpaca"):
        read(row)
    assert read(row, name="prompt_completion") == PromptCompletion("q", "a", None)
    assert isinstance(read(row, output="output"), Messages)


@pytest.mark.parametrize(
    ("extra", "question"),
    [({"input": "data"}, "do\n\ndata"), ({"input": ""}, "do"), ({"input": None}, "do"), ({}, "do")],
)
def test_alpaca_joins_instruction_and_input_where_there_is_one(extra, question):
    turns = read({"instruction": "do", "output": "done", **extra}).turns
    assert turns == [{"role": "user", "content": question}, {"role": "assistant", "content": "done"}]


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
    assert read({"messages": [{"role": "assistant", "content": "a"}], "tools": tools}).tools == [{"name": "f"}]


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": []}, "must be a list of messages that is not empty"),
        ({"messages": "hello"}, "must be a list of messages"),
        ({"messages": [USER]}, "no message of the assistant"),
        ({"messages": [USER, "b"]}, "message 2 must be an object"),
        ({"messages": [USER, {"role": "bot", "content": "b"}]}, "message 2 has the role 'bot'"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "the assistant's content is empty"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "type 'image' is not supported"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "reasoning", "text": "b"}]}]}, "'reasoning'"),
        ({"messages": [USER, ASSISTANT | {"loss_weight": 0.0}]}, r"message 2: loss_weight=0\.0 is not supported"),
        ({"messages": [USER | {"weight": 1}, ASSISTANT]}, "message 1: weight=1 is not supported"),
        ({"messages": [USER, ASSISTANT], "tools": "search"}, 'the field "tools" is text, but not JSON'),
        ({"messages": [USER, ASSISTANT], "tools": {"name": "f"}}, 'the field "tools" must be a list of objects'),
        ({"instruction": "", "output": "x"}, 'the field "instruction" is empty'),
    ],
)
def test_what_cannot_be_trained_on_as_it_stands_is_refused(row, expected):
    with pytest.raises(BadRow, match=expected):
        read(row)


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"text": "t", "label": 3}, {}, TextLabel("t", "3")),
        ({"sentence": "t", "label": "NUM:date"}, {}, TextLabel("t", "NUM:date")),
        ({"title": "t", "description": "d", "label": 1}, {}, TextLabel("t\nd", "1")),
        ({"title": "t", "description": "d", "label": 1}, {"text": "description"}, TextLabel("d", "1")),
        ({"sentence": "t", "stars": 4}, {"label": "stars"}, TextLabel("t", "4")),
        ({"body": "t", "stars": 4}, {"text": "body", "label": "stars"}, TextLabel("t", "4")),
    ],
)
def test_text_and_label_are_recognised_under_their_names_and_mapped_ones(row, columns, expected):
    assert read(row, is_classification=True, **columns) == expected


@pytest.mark.parametrize("label", [None, True, 0.5, [1], "", "\ud800"])
def test_label_must_be_a_whole_number_or_a_name(label):
    with pytest.raises(BadRow, match='the field "label"'):
        read({"text": "t", "label": label}, is_classification=True)


def test_mapped_field_that_is_not_there_is_named_with_its_key_and_the_nearest_field():
    with pytest.raises(UnknownFormat) as caught:
        read({"question": "q", "answer": "a"}, prompt="questoin")
    expected = 'no field "questoin" (dataset.columns.prompt); fields: question, answer; did you mean "question"?'
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("name", "is_classification", "takes"),
    [("text_label", False, "messages or prompt_completion or alpaca"), ("alpaca", True, "text_label")],
)
def test_format_of_another_recipe_is_refused(name, is_classification, takes):
    with pytest.raises(UnknownFormat, match=f"dataset.format={name} does not suit this recipe; it takes {takes}"):
        read({"text": "t", "label": 1}, name=name, is_classification=is_classification)
