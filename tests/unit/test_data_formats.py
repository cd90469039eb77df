"""The format of a file is recognised from its fields, or asked for."""

import dataclasses
import json

import pytest

from automodel.data.formats.choose import Messages, PlainText, PromptCompletion, TextLabel, UnknownFormat, choose_format
from automodel.data.formats.preference import Preference
from automodel.data.prepare.preparers import PrepareOptions, choose_first
from automodel.data.rows import BadRow, Row
from automodel.tasks.causal_lm import CausalLM
from automodel.types import UserError


def read(row, *, name="auto", is_classification=False, is_preference=False, **columns):
    formats = ("text_label",) if is_classification else ("preference",) if is_preference else CausalLM.formats
    chosen = choose_format(name, columns, row=row, candidates=formats)
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
    assert read({"messages": [{"role": "assistant", "content": "a"}], "tools": tools}).tools == [
        {"type": "function", "function": {"name": "f"}}
    ]


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
WORSE = {"role": "assistant", "content": "c"}
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


@pytest.mark.parametrize("extra", [{}, {"id": 3, "url": "u"}])
def test_text_alone_is_text_to_pretrain_on(extra):
    assert read({"text": "t"} | extra) == PlainText("t")


@pytest.mark.parametrize(
    ("extra", "told"), [({"label": 1}, "recipe=llm_seq_cls trains on"), ({"title": "t"}, "of no known format")]
)
def test_text_with_more_that_may_be_learnt_is_not_guessed(extra, told):
    with pytest.raises(UnknownFormat, match=rf"fields: text, .* {told}.*dataset\.columns"):
        read({"text": "t"} | extra)
    assert read({"text": "t"} | extra, name="text") == read({"text": "t"} | extra, text="text") == PlainText("t")


PAIR = Preference([USER], [ASSISTANT], [WORSE])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [WORSE]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]},
        {"prompt": "a", "chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]},
        {"messages": [USER], "chosen": ASSISTANT, "rejected": WORSE},
        {"chosen_messages": [USER, ASSISTANT], "rejected_messages": [USER, WORSE]},
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
    ],
)
def test_preference_pairs_are_read_for_their_recipe_and_refused_by_others(row):
    assert read(row, is_preference=True) == PAIR
    with pytest.raises(UnknownFormat, match=r"preference pairs.*dataset\.columns\.completion"):
        read(row)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"chosen": "b", "rejected": "c"}, r"no prompt.*dataset\.columns\.prompt"),
        ({"chosen": [USER, ASSISTANT], "rejected": [WORSE]}, "do not begin with the same prompt"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, USER]}, "do not begin with the same prompt"),
        ({"prompt": "x", "chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]}, "the prompt is not the one"),
    ],
)
def test_pair_without_a_certain_prompt_is_refused(row, expected):
    with pytest.raises(BadRow, match=expected):
        read(row, is_preference=True)


def test_chosen_answers_can_be_trained_on_by_mapping():
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert read(row, prompt="prompt", completion="chosen") == PromptCompletion("a", "b")


def test_messages_with_a_boolean_label_are_not_guessed():
    row = {"messages": [USER, ASSISTANT], "label": False}
    with pytest.raises(UnknownFormat, match=r"boolean label.*choose dataset\.format=messages to train on all"):
        read(row)
    assert read(row, name="messages") == Messages([USER, ASSISTANT])


NESTED = {"context": "c", "question": "q", "answers": {"text": ["a", "b"], "start": [3]}, "n": 2, "flag": True}


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("{context}\n\n{question}", "c\n\nq"),
        ("{answers[text][0]}", "a"),
        ("{answers[text][1]}!", "b!"),
        ("{n}", "2"),
        ("{answers[start][0]} of {n}", "3 of 2"),
        ("{{{question}}}", "{q}"),
    ],
)
def test_column_may_be_a_pattern_over_fields(pattern, text):
    assert read(NESTED, prompt="question", completion=pattern) == PromptCompletion("q", text)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{question.__class__}", "must be a field's name"),
        ("{answers[text].__len__}", "must be a field's name"),
        ("{question!r}", "must be a field's name"),
        ("{n:>10}", "must be a field's name"),
        ("{}", "must be a field's name"),
        ("{question", "is no pattern"),
        ("{contxt}", 'no field "contxt".*did you mean "context"'),
    ],
)
def test_pattern_that_is_none_is_refused_with_its_key(pattern, expected):
    with pytest.raises(UnknownFormat, match=expected) as caught:
        read(NESTED, prompt="question", completion=pattern)
    assert "dataset.columns.completion" in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{answers[texts][0]}", 'no "texts" in "answers"'),
        ("{answers[text][2]}", r'no "2" in "answers\[text\]"'),
        ("{answers[text][a]}", 'no "a" in'),
        ("{question[0]}", 'no "0" in "question"'),
        ("so {answers[text]}", "must be text or a number"),
        ("{answers[text]}", "must be text, not"),
        ("{flag}", "must be text, not"),
    ],
)
def test_value_that_a_pattern_does_not_find_is_a_bad_row(pattern, expected):
    with pytest.raises(BadRow, match=expected):
        read(NESTED, prompt="question", completion=pattern)


def test_pattern_of_one_reference_may_stand_for_messages():
    assert read({"data": {"turns": [USER, ASSISTANT]}}, messages="{data[turns]}") == Messages([USER, ASSISTANT])


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
        ({"messages": [USER, {"role": "assistant", "content": [TEXT, THOUGHT]}]}, "must stand in this order"),
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


@pytest.mark.parametrize("label", [None, 0.5, [1], "", "\ud800"])
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
    [
        ("text_label", False, "messages or sharegpt or prompt_completion or alpaca or text"),
        ("alpaca", True, "text_label"),
    ],
)
def test_format_of_another_recipe_is_refused(name, is_classification, takes):
    with pytest.raises(UnknownFormat, match=f"dataset.format={name} does not suit this recipe; it takes {takes}"):
        read({"text": "t", "label": 1}, name=name, is_classification=is_classification)


def test_a_newline_spelt_out_in_a_pattern_is_one():
    row = {"a": "x", "b": "y", "c": "z"}
    chosen = choose_format("auto", {"prompt": r"{a}\n{b}", "completion": "c"}, row=row, candidates=CausalLM.formats)
    assert chosen.read(row).prompt == "x\ny"


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


@pytest.mark.parametrize(
    ("extra", "prompt"),
    [
        ({"system": "Be brief."}, "Be brief.\n\nq"),
        ({"context": "c"}, "c\n\nq"),
        ({"input": "c", "system": "s"}, "s\n\nc\n\nq"),
        ({"context": "q"}, "q"),  # which the prompt holds already
        ({"context": " ", "system": None}, "q"),
        ({"context": ["c"]}, "q"),
    ],
)
def test_system_and_context_stand_before_a_prompt(extra, prompt):
    assert read({"question": "q", "answer": "a"} | extra) == PromptCompletion(prompt, "a", None)
    assert read({"question": "q", "answer": "a"} | extra, prompt="question", completion="answer").prompt == "q"


def test_context_and_response_are_names_of_alpacas_input_and_output():
    turns = read({"instruction": "do", "context": "data", "response": "done"}).turns
    assert [turn["content"] for turn in turns] == ["do\n\ndata", "done"]


def rest(row, **columns):
    return choose_format("auto", columns, row=row, candidates=CausalLM.formats).read_with_rest(row)[1]


def test_fields_that_nothing_reads_are_named():
    row = {"question": "q", "answer": "a", "context": ["c"], "id": 3, "history": [], "note": " ", "other": {"a": None}}
    assert rest(row) == ["context", "id"]
    assert rest(row, prompt="{context[0]} {question}", completion="answer") == ["id"]
    assert rest({"messages": [USER, ASSISTANT], "functions": [{"name": "f"}], "images": ["a.png"]}) == ["images"]
    assert rest({"messages": [USER, ASSISTANT], "tools": [{"name": "f"}], "functions": [{"name": "g"}]}) == [
        "functions"
    ]


@pytest.mark.parametrize(
    ("row", "is_classification", "told"),
    [
        ({"sentence": "s", "label": 1}, False, "recipe=llm_seq_cls trains on rows of this format"),
        ({"messages": [USER, ASSISTANT]}, True, "recipe=llm_sft trains on rows of this format"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, True, "no recipe trains on yet"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, False, "no recipe trains on yet"),
        ({"query": "q", "response": "a"}, False, "dataset.columns.prompt=query dataset.columns.completion=response"),
        ({"review": "r", "sentiment": "s"}, True, "dataset.columns.text=review dataset.columns.label=sentiment"),
    ],
)
def test_who_takes_the_rows_or_how_to_map_them_is_told(row, is_classification, told):
    with pytest.raises(UnknownFormat, match=told):
        read(row, is_classification=is_classification)


def test_a_mapped_field_may_be_missing_from_the_first_row(tmp_path):
    rows = [{"q": "1", "a": "x"}, {"q": "2", "a": "y", "who": "You shout."}]
    placed = [Row(f"rows:{number}", row) for number, row in enumerate(rows)]
    columns = {"prompt": "q", "completion": "a", "system": "who"}
    options = PrepareOptions(limit=None, max_length=10, truncation="right", columns=columns)
    chosen = choose_first(placed, options, candidates=CausalLM.formats)
    assert [chosen.read(row).prompt for row in rows] == ["1", "You shout.\n\n2"]
    wrong = dataclasses.replace(options, columns=columns | {"system": "whom"})
    with pytest.raises(UserError, match=r'no field "whom" \(dataset\.columns\.system\)'):
        choose_first(placed, wrong, candidates=CausalLM.formats)
