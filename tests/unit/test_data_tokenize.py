"""Which tokens of a prompt with its completion are supervised, and what cutting leaves of them."""

import json
from pathlib import Path

import pytest

from automodel.data.prepare.prepared import PreparedRows
from automodel.data.prepare.tokenize import UNSEPARATED
from automodel.data.sources import DemoDataset, FileDataset
from automodel.models.char_tokenizer import build_char_tokenizer
from automodel.tasks.sequence_classification import SequenceClassification
from automodel.types import UserError
from tests.unit.rows import load_classification, load_sft


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(tmp_path, *rows, tokenizer=None, model_max_length=None, **options):
    source = FileDataset(path=write(tmp_path / "rows.jsonl", *rows), **options)
    return load_sft(source, tokenizer or build_char_tokenizer(), model_max_length=model_max_length)


def supervised(example) -> list[int]:
    return [label for label in example["labels"] if label != -100]


@pytest.fixture(scope="module")
def stories_tokenizer(stories):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories)


@pytest.fixture(scope="module")
def minimind(shared_data):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "templates" / "tok_minimind")


def test_labels_are_the_next_token_of_the_completion_and_eos_alone(tmp_path):
    (example,) = load(tmp_path, {"prompt": "ab", "completion": "cd"}).examples
    tokens = build_char_tokenizer().convert_tokens_to_ids(["<s>", "a", "b", "c", "d", "</s>"])
    assert example["input_ids"] == tokens
    assert example["labels"] == [-100, -100, *tokens[3:], -100]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("a", "b"), ("a ", "b"), ("a\n", "b"), ("a", " b"), ("a", "\nb"), ("a ", " b"), ("", "b")],
)
def test_nothing_is_put_between_prompt_and_completion(tmp_path, prompt, completion):
    (example,) = load(tmp_path, {"prompt": prompt, "completion": completion}).examples
    assert build_char_tokenizer().decode(example["input_ids"]) == f"<s>{prompt}{completion}</s>"
    assert build_char_tokenizer().decode(supervised(example)) == f"{completion}</s>"


def test_rows_without_white_space_at_the_border_are_counted(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a ", "completion": "b"}, {"prompt": "", "completion": "b"}]
    assert load(tmp_path, *rows, rows[0]).counts.notes == {UNSEPARATED: 2}


def test_pattern_puts_a_separator_where_asked(tmp_path):
    row, columns = {"question": "a", "answer": "b"}, {"prompt": "{question}\n"}
    prepared = load(tmp_path, row, columns=columns)
    assert build_char_tokenizer().decode(prepared.examples[0]["input_ids"]) == "<s>a\nb</s>"
    assert build_char_tokenizer().decode(supervised(prepared.examples[0])) == "b</s>"


@pytest.mark.parametrize("name", ["stories_tokenizer", "minimind"])
def test_real_rows_render_as_one_text_with_the_answer_supervised(request, shared_data, name):
    tokenizer = request.getfixturevalue(name)
    path = shared_data / "sft" / "gsm8k_train.jsonl"
    source = FileDataset(path=str(path), limit=200, columns={"prompt": "{question}\n"})
    prepared = load_sft(source, tokenizer, model_max_length=None)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:200]]
    assert prepared.counts.num_label_tokens == sum(len(supervised(example)) for example in prepared.examples)
    for row, example, prompt in zip(rows, prepared.examples, prepared.prompts, strict=True):
        ids, labels = example["input_ids"], example["labels"]
        first = next(t for t, label in enumerate(labels) if label != -100)
        assert labels[first:] == [*ids[first + 1 :], -100]
        assert ids.count(tokenizer.eos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id or name == "minimind"
        assert tokenizer.decode(labels[first:-1]) == row["answer"] + tokenizer.eos_token
        assert tokenizer.decode(ids[: first + 1], skip_special_tokens=True) == row["question"] + "\n"
        assert prompt.prompt_ids == ids[: first + 1]
        assert (prompt.question, prompt.answer) == (row["question"] + "\n", row["answer"])


@pytest.mark.parametrize("name", ["stories_tokenizer", "minimind"])
def test_text_that_looks_like_a_special_token_stays_text(request, tmp_path, name):
    tokenizer = request.getfixturevalue(name)
    text = "".join(tokenizer.all_special_tokens)
    (example,) = load(tmp_path, {"prompt": f"a{text}", "completion": f"b{text}"}, tokenizer=tokenizer).examples
    specials = [i for i in example["input_ids"] if i in tokenizer.all_special_ids]
    begins = [tokenizer.bos_token_id] if name == "stories_tokenizer" else []
    assert specials == [*begins, tokenizer.eos_token_id]
    assert tokenizer.decode(supervised(example)) == f"b{text}{tokenizer.eos_token}"


def test_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = build_char_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos token"):
        load(tmp_path, {"prompt": "a", "completion": "b"}, tokenizer=tokenizer)


# "<s>abcd\nwxyz</s>" is 11 tokens long, of which the last 5 are supervised.
LONG = {"prompt": "abcd\n", "completion": "wxyz"}


@pytest.mark.parametrize(
    ("truncation", "text", "answer"),
    [("right", "<s>abcd\nwx", "wx"), ("left", "cd\nwxyz</s>", "wxyz</s>")],
)
def test_long_row_is_cut_at_the_side_asked_for(tmp_path, truncation, text, answer):
    prepared = load(tmp_path, LONG, max_length=8, truncation=truncation)
    assert build_char_tokenizer().decode(prepared.examples[0]["input_ids"]) == text
    assert build_char_tokenizer().decode(supervised(prepared.examples[0])) == answer
    assert (prepared.counts.num_truncated, prepared.counts.num_dropped) == (1, 0)


def test_long_row_is_dropped_where_asked_and_the_others_stay(tmp_path):
    prepared = load(tmp_path, LONG, {"prompt": "a", "completion": "b"}, max_length=8, truncation="drop")
    assert len(prepared.examples) == len(prepared.prompts) == 1
    assert (prepared.counts.num_rows_read, prepared.counts.num_dropped, prepared.counts.num_truncated) == (2, 1, 0)


def test_long_row_is_an_error_where_asked_with_its_line_and_lengths(tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl:2: 11 tokens, more than dataset\.max_length=8 tokens"):
        load(tmp_path, {"prompt": "a", "completion": "b"}, LONG, max_length=8, truncation="error")


def test_row_whose_answer_would_be_cut_off_is_dropped_and_counted(tmp_path):
    prepared = load(tmp_path, LONG, {"prompt": "a", "completion": "b"}, max_length=6)
    assert (len(prepared.examples), prepared.counts.num_dropped, prepared.counts.num_truncated) == (1, 1, 0)
    assert all(supervised(example) for example in prepared.examples)


def test_nothing_left_of_any_row_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"of all 1 rows nothing supervised is left within dataset\.max_length=6"):
        load(tmp_path, LONG, max_length=6)


def test_shorter_limit_of_the_model_holds(tmp_path):
    prepared = load(tmp_path, LONG, model_max_length=8)
    assert len(prepared.examples[0]["input_ids"]) == 8
    assert len(load(tmp_path, LONG, max_length=9, model_max_length=100).examples[0]["input_ids"]) == 9


def test_prompt_to_answer_is_never_longer_than_the_model_reads(tmp_path):
    row = {"prompt": "abcdefgh\n", "completion": "x"}
    prepared = load(tmp_path, row, max_length=6, truncation="left")
    assert build_char_tokenizer().decode(prepared.prompts[0].prompt_ids) == "defgh\n"


def test_demo_rows_carry_their_kind_and_have_no_key_of_a_file():
    prepared = load_sft(DemoDataset(limit=12), build_char_tokenizer(), model_max_length=512)
    assert prepared.counts.num_rows_read == 12
    assert {prompt.kind for prompt in prepared.prompts} > {"add", "reverse"}


def classify(path, tokenizer, known=None, model_max_length=None, head_labels=(), **options):
    source = FileDataset(path=str(path), **options)
    return load_classification(
        source, tokenizer, model_max_length=model_max_length, known=known, head_labels=head_labels
    )


@pytest.mark.parametrize(
    ("labels", "names"),
    [([10, 9, 10], ("9", "10")), (["b", "a"], ("a", "b")), ([-1, 1, 0], ("-1", "0", "1")), (["x", 2], ("2", "x"))],
)
def test_label_names_are_sorted_and_numbered_from_zero(tmp_path, labels, names):
    path = write(tmp_path / "rows.jsonl", *({"text": "t", "label": label} for label in labels))
    prepared = classify(path, build_char_tokenizer())
    assert prepared.task.label_names == names
    assert prepared.examples["labels"][:] == [names.index(str(label)) for label in labels]


def test_unknown_label_of_the_validation_set_is_an_error_with_its_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"text": "t", "label": "a"}, {"text": "t", "label": "c"})
    with pytest.raises(UserError, match=r"rows\.jsonl:2: label 'c' does not occur in the training set.*: a, b"):
        classify(path, build_char_tokenizer(), known=known(["a", "b"]))
    with pytest.raises(UserError, match="on_bad_row=skip leaves such rows out"):
        classify(path, build_char_tokenizer(), known=known(["a", "b"]))
    assert len(classify(path, build_char_tokenizer(), known=known(["a", "b"]), on_bad_row="skip").examples) == 1
    assert classify(path, build_char_tokenizer(), known=known(["c", "b", "a"])).examples["labels"][:] == [2, 0]


def known(labels):
    return PreparedRows("train", [], SequenceClassification(tuple(labels), tuple(labels)), "", None, None)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([False, True, False], ("false", "true")),
        ([0.0, 2.0, 1.0], ("0", "1", "2")),
        ([10.0, 9, "1.0"], ("1.0", "9", "10")),
    ],
)
def test_booleans_and_whole_numbers_are_classes(tmp_path, labels, names):
    path = write(tmp_path / "rows.jsonl", *({"text": "t", "label": label} for label in labels))
    prepared = classify(path, build_char_tokenizer())
    spelt = [str(int(label)) if isinstance(label, float) else str(label).lower() for label in labels]
    assert prepared.task.label_names == names
    assert prepared.examples["labels"][:] == [names.index(label) for label in spelt]


@pytest.mark.parametrize(
    ("label", "told"),
    [
        (["a"], "is a list of labels; .*multi-label"),
        (0.5, "is 0.5: a score is not a class"),
        (None, "is empty: the row has no label"),
        (float("nan"), "is empty: the row has no label"),
        ({"a": 1}, "must be a whole number, true or false, or a name"),
    ],
)
def test_what_is_no_class_is_told_by_row(tmp_path, label, told):
    path = write(tmp_path / "rows.jsonl", {"text": "t", "label": 1}, {"text": "t", "label": label})
    with pytest.raises(UserError, match=rf'rows\.jsonl:2: the field "label" {told}'):
        classify(path, build_char_tokenizer())


@pytest.mark.parametrize(
    ("labels", "head", "names", "numbers"),
    [
        (["no", "yes", "maybe"], ["yes", "no", "maybe"], ["yes", "no", "maybe"], [1, 0, 2]),
        (["No", "maybe"], ["yes", "no", "maybe"], ["yes", "no", "maybe"], [1, 2]),  # the head keeps all it knows
        ([2, 0], ["yes", "no", "maybe"], ["yes", "no", "maybe"], [2, 0]),
        ([2, 0], ["LABEL_0", "LABEL_1", "LABEL_2"], ["0", "1", "2"], [2, 0]),
        (["b", "a"], ["yes", "no"], ["a", "b"], [1, 0]),
        ([1, 2], ["yes", "no"], ["1", "2"], [0, 1]),
    ],
)
def test_a_trained_head_keeps_the_order_of_its_labels(tmp_path, caplog, labels, head, names, numbers):
    path = write(tmp_path / "rows.jsonl", *({"text": "t", "label": label} for label in labels))
    prepared = classify(path, build_char_tokenizer(), head_labels=head)
    assert (list(prepared.task.label_names), prepared.examples["labels"][:]) == (names, numbers)
    is_told = "the labels are not those of the checkpoint's head (yes, no), which is trained on with" in caplog.text
    assert is_told == (head == ["yes", "no"])
    val = classify(path, build_char_tokenizer(), known=prepared)
    assert val.examples["labels"][:] == numbers


def test_minus_one_is_a_class_with_a_warning(tmp_path, caplog):
    for labels, is_told in (([-1, 1], False), ([-1, 0, 1], True)):
        path = write(tmp_path / "rows.jsonl", *({"text": "t", "label": label} for label in labels))
        classify(path, build_char_tokenizer())
        assert ("-1 is trained as a class" in caplog.text) == is_told


def test_one_label_alone_is_an_error(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"text": "t", "label": "a"})
    with pytest.raises(UserError, match="every row has the label 'a'"):
        classify(path, build_char_tokenizer())


def test_text_to_classify_never_ends_in_the_pad_token(tmp_path):
    tokenizer = build_char_tokenizer()
    path = write(tmp_path / "rows.jsonl", {"text": "ab\u00e9\u00e9", "label": 1}, {"text": "abcdef", "label": 2})
    tokenizer.pad_token = tokenizer.unk_token  # as in stories260k: letters that are not known are pads
    prepared = classify(path, tokenizer, max_length=5)
    assert [tokenizer.decode(example["input_ids"]) for example in prepared.examples] == ["<s>ab", "<s>abcd"]


def test_special_tokens_around_a_text_to_classify_survive_cutting(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_char_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    path = write(tmp_path / "rows.jsonl", {"text": "abcdef</s>", "label": 1}, {"text": "g", "label": 2})
    prepared = classify(path, tokenizer, max_length=5)
    assert [tokenizer.decode(example["input_ids"]) for example in prepared.examples] == ["<s>abc</s>", "<s>g</s>"]
    assert prepared.counts.num_truncated == 1


@pytest.mark.parametrize(("name", "num_labels"), [("ag_news", 4), ("sst2", 2), ("trec", None)])
def test_real_rows_are_classified_with_the_labels_of_the_training_set(shared_data, stories_tokenizer, name, num_labels):
    folder = shared_data / "seqcls"
    train = classify(folder / f"{name}_train.jsonl", stories_tokenizer)
    if num_labels is None:
        assert all(":" in label for label in train.task.label_names)
        return
    val = classify(folder / f"{name}_val.jsonl", stories_tokenizer, known=train)
    rows = [json.loads(line) for line in (folder / f"{name}_val.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(train.task.label_names) == num_labels
    assert [train.task.label_names[label] for label in val.examples["labels"]] == [str(row["label"]) for row in rows]
    for row, example in zip(rows[:50], val.examples, strict=False):
        text = row.get("sentence") or f"{row['title']}\n{row['description']}"
        assert stories_tokenizer.decode(example["input_ids"], skip_special_tokens=True) == text
        assert example["input_ids"][-1] != stories_tokenizer.pad_token_id


def test_many_rows_keep_their_order():
    tokenizer = build_char_tokenizer()
    prepared = load_sft(DemoDataset(limit=2500), tokenizer, model_max_length=512)
    assert len(prepared.examples) == len(prepared.prompts) == 2500
    for number in (0, 999, 1000, 1999, 2000, 2499):
        prompt = prepared.prompts[number]
        text = tokenizer.decode(prepared.examples[number]["input_ids"], skip_special_tokens=True)
        assert text == prompt.question + prompt.answer
