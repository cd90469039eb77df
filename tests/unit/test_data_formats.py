"""The format of a file is recognised from its fields, or asked for."""

import re

import pytest

from automodel.config.targets import check_target
from automodel.data.formats.choose import UnknownFormat, choose_for_file, choose_format
from automodel.data.formats.samples import Messages, PlainText, Preference, PromptCompletion, TextLabel
from automodel.data.rows import BadRow, Row
from automodel.tasks.causal_lm import CausalLM
from automodel.types import UserError


def read(row, *, name="auto", is_classification=False, is_preference=False, **columns):
    samples = (TextLabel,) if is_classification else (Preference,) if is_preference else CausalLM.samples
    return choose_format(name, columns, row=row, samples=samples).read(row)


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


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
WORSE = {"role": "assistant", "content": "c"}


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
    chosen = choose_format("auto", {"prompt": r"{a}\n{b}", "completion": "c"}, row=row, samples=CausalLM.samples)
    assert chosen.read(row).prompt == "x\ny"


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
    return choose_format("auto", columns, row=row, samples=CausalLM.samples).read_with_rest(row)[1]


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
    chosen = choose_for_file(placed, "auto", columns, samples=CausalLM.samples)
    assert [chosen.read(row).prompt for row in rows] == ["1", "You shout.\n\n2"]
    with pytest.raises(UserError, match=r'no field "whom" \(dataset\.columns\.system\)'):
        choose_for_file(placed, "auto", columns | {"system": "whom"}, samples=CausalLM.samples)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("alpca", r"must be one of auto, messages, .*as my_module\.MyFormat; did you mean alpaca\?"),
        ("no_such.Format", "must be a class that can be imported; ModuleNotFoundError: No module named 'no_such'"),
        ("json.JSONDecoder", r"must be a class that inherits from automodel\.data\.formats\.row_format\.RowFormat"),
    ],
)
def test_a_format_that_does_not_exist_is_refused_before_the_rows_are_read(name, told):
    section = {"_target_": "automodel.data.sources.FileDataset", "path": "rows.jsonl", "format": name}
    (problem,) = check_target("dataset", section)
    assert re.match(f"dataset.format={name} {told}", problem)
    with pytest.raises(UnknownFormat, match=f"dataset.format={name} {told}"):  # a mixture's sources are not checked
        read({"text": "t"}, name=name)
