"""Damaged files are named by file and line, all problems at once."""

import json
from pathlib import Path

import pytest

from automodel.data.prepare import load_sft
from automodel.data.sources import JsonlDataset
from automodel.models.char_tokenizer import build_char_tokenizer
from automodel.types import UserError

GOOD = b'{"prompt": "a", "completion": "b"}'


def load(path: Path | str, **options):
    return load_sft(JsonlDataset(path=str(path), **options), build_char_tokenizer(), model_max_length=None)


def problems_of(tmp_path: Path, *lines: bytes, **options) -> list[str]:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(UserError) as caught:
        load(file, **options)
    return [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{nonsense", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        (b'{"prompt": "a", "completion"', "not JSON"),
        (b'["a", "b"]', "a row must be a JSON object, not a list"),
        (b"null", "a row must be a JSON object, not null"),
        (b'"text"', "a row must be a JSON object, not text"),
        (b'{"prompt": "a"}', 'no field "completion"; fields: prompt'),
        (b'{"prompt": "a", "completoin": "b"}', 'did you mean "completoin"?'),
        (b'{"prompt": "a", "completion": null}', 'the field "completion" must be text, not null'),
        (b'{"prompt": "a", "completion": ["b"]}', 'the field "completion" must be text, not a list'),
        (b'{"prompt": 3, "completion": "b"}', 'the field "prompt" must be text, not a number'),
        (b'{"prompt": true, "completion": "b"}', 'the field "prompt" must be text, not true or false'),
        (b'{"prompt": "a", "completion": " \\n"}', 'the field "completion" is empty'),
        (b'{"prompt": "\\ud83d", "completion": "b"}', 'the field "prompt" holds half of a surrogate pair'),
        (b'{"prompt": "a", "completion": "b\\u0000"}', 'the field "completion" holds a NUL character'),
        (b'{"prompt": "caf\xe9", "completion": "b"}', "not UTF-8 (byte 16 of the line)"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a", "completion": "b", "n": ' + b"9" * 5000 + b"}", "not usable: Exceeds the limit"),
    ],
)
def test_damaged_row_is_named_with_its_line_and_what_is_wrong(tmp_path, line, expected):
    (problem,) = problems_of(tmp_path, GOOD, b"", line, GOOD)
    assert problem.startswith("rows.jsonl:3: ")
    assert expected in problem


def test_first_five_problems_are_named_and_the_others_counted(tmp_path):
    problems = problems_of(tmp_path, GOOD, *[b"{"] * 3, GOOD, *[b"[]"] * 9)
    assert [problem.split(": ")[0] for problem in problems[:5]] == [f"rows.jsonl:{n}" for n in (2, 3, 4, 6, 7)]
    assert problems[5:] == ["... and 7 more damaged rows"]


def test_problem_in_the_format_of_the_file_is_told_once(tmp_path):
    row = json.dumps({"questoin": "a", "response": "b"}).encode()
    (problem,) = problems_of(tmp_path, row, row, row)
    assert problem.startswith("rows.jsonl:1: the fields questoin, response are of no known format")
    assert "dataset.columns" in problem


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
def test_file_without_rows_is_an_error(tmp_path, content):
    file = tmp_path / "empty.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match="holds no rows"):
        load(file)


@pytest.mark.parametrize("name", ["missing.jsonl", "no_such_folder/*.jsonl", "."])
def test_path_without_files_is_an_error(tmp_path, name):
    with pytest.raises(UserError, match=r"dataset\.path=.* does not exist, or holds no \.jsonl file"):
        load(tmp_path / name)


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_accepted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n   \n" + GOOD)
    assert load(file).counts.num_rows_read == 2


def test_line_separators_of_unicode_do_not_end_a_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a\u2028\x85b", "completion": "c"}\n', encoding="utf-8")
    assert load(file).prompts[0].question == "a\u2028\x85b"


def test_folder_and_glob_are_read_in_the_order_of_names(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_text(json.dumps({"prompt": name, "completion": "x"}))
    for path in (tmp_path, tmp_path / "*.jsonl"):
        assert [prompt.question for prompt in load(path).prompts] == ["a.jsonl", "b.jsonl"]


def test_problem_in_a_second_file_is_named_by_that_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "b.jsonl").write_bytes(GOOD + b"\n{")
    with pytest.raises(UserError, match=r"b\.jsonl:2: not JSON"):
        load(tmp_path)


def test_limit_reads_the_first_rows_and_nothing_behind_them(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD + b"\n" + GOOD + b"\n{damaged")
    assert load(file, limit=2).counts.num_rows_read == 2


def test_fingerprint_changes_with_the_rows_and_the_options_but_not_the_place(tmp_path):
    for name, text in (("a", GOOD), ("same", GOOD), ("other", GOOD.replace(b"b", b"c"))):
        (tmp_path / f"{name}.jsonl").write_bytes(text)
    first = load(tmp_path / "a.jsonl").fingerprint
    assert len(first) == 16
    assert first == load(tmp_path / "same.jsonl").fingerprint
    assert first != load(tmp_path / "other.jsonl").fingerprint
    assert first != load(tmp_path / "a.jsonl", max_length=100).fingerprint
