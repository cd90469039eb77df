"""Rows of every kind of file, their places and positions; damaged ones are named, all problems at once."""

import csv
import gzip
import io
import json
import random
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from automodel.data.files.readers import count_rows, local_files, read_files
from automodel.data.files.split import RowSlice, parse_split
from automodel.data.rows import Position
from automodel.data.sources import FileDataset
from automodel.models.char_tokenizer import build_char_tokenizer
from automodel.types import UserError
from tests.unit.rows import load_sft

GOOD = b'{"prompt": "a", "completion": "b"}'


def load(path: Path | str, **options):
    return load_sft(FileDataset(path=str(path), **options), build_char_tokenizer(), model_max_length=None)


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
    assert problem.startswith("rows.jsonl:1: ")
    assert "questoin, response are of no known format" in problem
    assert "dataset.columns" in problem


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
def test_file_without_rows_is_an_error(tmp_path, content):
    file = tmp_path / "empty.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match="holds no rows"):
        load(file)


@pytest.mark.parametrize("name", ["missing.jsonl", "no_such_folder/*.jsonl", "."])
def test_path_without_files_is_an_error(tmp_path, name):
    with pytest.raises(UserError, match=r"dataset\.path=.* does not exist, or holds no "):
        load(tmp_path / name)


def test_byte_order_mark_blank_lines_and_windows_line_ends_are_accepted(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n   \n" + GOOD)
    assert load(file).counts.num_rows_read == 2


def test_line_separators_of_unicode_do_not_end_a_row(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a\u2028\x85b", "completion": "c"}\n', encoding="utf-8")
    assert load(file).prompts[0].question == "a\u2028\x85b"


def test_folder_and_glob_give_data_files_in_the_order_of_names(tmp_path):
    names = ["b.jsonl", "a.JSON", "c.txt", "d.csv.gz", "e.tsv", "f.parquet", "g.md", ".h.jsonl", "i.gz", "README"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "folder.jsonl").mkdir()
    assert [file.name for file in local_files(str(tmp_path))] == sorted(names[:6])
    assert [file.name for file in local_files(f"{tmp_path}/*.[jt]s*")] == ["b.jsonl", "e.tsv"]
    assert local_files(f"{tmp_path}/g.md") == [tmp_path / "g.md"]
    assert local_files(f"{tmp_path}/missing") == []


def test_name_that_is_also_a_pattern_is_the_file_of_that_name(tmp_path):
    (tmp_path / "a[1].jsonl").touch()
    assert local_files(f"{tmp_path}/a[1].jsonl") == [tmp_path / "a[1].jsonl"]


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


ROWS = [
    {"text": "plain", "label": "a"},
    {"text": "", "label": "empty"},
    {"text": 'quoted "word", and comma', "label": "b"},
    {"text": "two\nlines; and\ta tab", "label": "c"},
    {"text": "\n\n in the midst of blank lines\n\n", "label": "d"},
    {"text": "caf\u00e9 \u4f60\u597d \U0001f600 \u2028 \x85", "label": "e"},
    {"text": "[1, {", "label": "]}"},
    {"text": "last", "label": " f "},
]
TEXTS = [
    "plain",
    "  indented",
    'a "quoted" one, with comma',
    "caf\u00e9 \u4f60\u597d \U0001f600 \u2028 \x85",
    "a\tb",
    "last",
]


def csv_bytes(delimiter: str, *, line_end: str = "\n") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["text", "label"], delimiter=delimiter, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def parquet_bytes() -> bytes:
    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), out, row_group_size=3)
    return out.getvalue()


JSON_LINES = [json.dumps(row, ensure_ascii=number % 2 == 0) for number, row in enumerate(ROWS)]
BOM = b"\xef\xbb\xbf"
KINDS = {
    "lines.jsonl": "\n".join(JSON_LINES).encode(),
    "blank_lines.jsonl": BOM + "\r\n\n  \r\n".join(["", *JSON_LINES, ""]).encode(),
    "lines.json": "\n".join(JSON_LINES).encode(),
    "lines_in.txt": "\n".join(JSON_LINES).encode(),
    "array.json": json.dumps(ROWS).encode(),
    "array_in.jsonl": json.dumps(ROWS).encode(),
    "indented.json": BOM + json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "array_of_lines.json": b"[" + ",\n".join(JSON_LINES).encode() + b"]\n",
    "object.json": json.dumps({"version": [1, 2], "data": ROWS, "more": {"data": []}}, indent=1).encode(),
    "object_in_a_line.json": json.dumps({"rows": ROWS}).encode(),
    "comma.csv": csv_bytes(","),
    "semicolon.csv": csv_bytes(";"),
    "windows.csv": BOM + csv_bytes(",", line_end="\r\n"),
    "blank_lines.csv": b"\n" + csv_bytes(",", line_end="\n\n"),
    "tab.tsv": csv_bytes("\t"),
    "tab.csv": csv_bytes("\t"),
    "groups.parquet": parquet_bytes(),
    "parquet_named.data": parquet_bytes(),
}
KINDS |= {f"{name}.gz": gzip.compress(content) for name, content in KINDS.items()}
KINDS["packed_but_not_named.jsonl"] = KINDS["lines.jsonl.gz"]
KINDS["packed_in_two.jsonl"] = gzip.compress(KINDS["lines.jsonl"][:50]) + gzip.compress(KINDS["lines.jsonl"][50:])
TEXT_KINDS = {
    "lines.txt": "\n".join(TEXTS).encode(),
    "blank_lines.txt": BOM + "\r\n\n \t\n".join(["", *TEXTS, ""]).encode(),
}
TEXT_KINDS |= {f"{name}.gz": gzip.compress(content) for name, content in TEXT_KINDS.items()}
ALL_KINDS = KINDS | TEXT_KINDS


def written(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).write_bytes(ALL_KINDS[name])
    return [folder / name for name in names]


@pytest.mark.parametrize("name", ALL_KINDS)
def test_every_kind_gives_the_same_rows_for_the_same_content(tmp_path, name):
    files = written(tmp_path, name)
    expected = ROWS if name in KINDS else [{"text": text} for text in TEXTS]
    rows = [row for row, _ in read_files(files)]
    assert [row.fields for row in rows] == expected
    assert len({row.place for row in rows}) == len(rows)
    assert count_rows(files) == len(rows)


@pytest.mark.parametrize("name", ALL_KINDS)
def test_resuming_at_every_position_gives_the_remaining_rows_and_places(tmp_path, name):
    files = [*written(tmp_path, name), *written(tmp_path, "lines.jsonl")[:1]]
    steps = list(read_files(files))
    for number, (_, position) in enumerate(steps, start=1):
        saved = Position(*json.loads(json.dumps(position)))
        assert list(read_files(files, saved)) == steps[number:]
    assert list(read_files(files, Position(len(files)))) == []


def test_resuming_in_parquet_crosses_batches_and_row_groups(tmp_path):
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"n": range(1000)}), file, row_group_size=300)
    steps = list(read_files([file]))
    for number in (1, 127, 128, 129, 299, 300, 301, 600, 899, 999, 1000):
        assert list(read_files([file], steps[number - 1][1])) == steps[number:]


def test_bad_rows_are_the_same_after_resuming(tmp_path):
    contents = {
        "a.jsonl": GOOD + b"\n{\n[]\n" + GOOD,
        "a.csv": b'a,b\n1,2\n3\n"x" y,z\n4,5\n',
        "a.json": b'[{"a": 1}, 2,\n[], {}]',
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        steps = [(repr(row), position) for row, position in read_files([tmp_path / name])]
        assert len(steps) == 4
        for number, (_, position) in enumerate(steps, start=1):
            again = [(repr(row), after) for row, after in read_files([tmp_path / name], position)]
            assert again == steps[number:]


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("lines.jsonl", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("blank_lines.jsonl", [4, 7, 10, 13, 16, 19, 22, 25]),
        ("comma.csv", [2, 3, 4, 5, 7, 12, 13, 14]),
        ("indented.json", [2, 6, 10, 14, 18, 22, 26, 30]),
        ("array_of_lines.json", [1, 2, 3, 4, 5, 6, 7, 8]),
        ("groups.parquet", [f"row {number}" for number in range(1, 9)]),
        ("blank_lines.txt", [4, 7, 10, 13, 16, 19]),
    ],
)
def test_place_is_the_line_where_the_row_begins(tmp_path, name, places):
    for each in (name, f"{name}.gz"):
        (file,) = written(tmp_path, each)
        assert [row.place for row, _ in read_files([file])] == [f"{file}:{place}" for place in places]


def test_place_names_the_column_where_many_items_share_a_line(tmp_path):
    (file,) = written(tmp_path, "array.json")
    content = ALL_KINDS["array.json"].decode()
    places = [row.place for row, _ in read_files([file])]
    assert places[0] == f"{file}:1"
    assert places[2] == f"{file}:1:{content.index(json.dumps(ROWS[2])) + 1}"


def test_values_of_csv_stay_text_and_a_column_without_name_is_numbered(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes(b",text,label\n0,007,NaN\n1,,true\n")
    assert [row.fields for row, _ in read_files([file])] == [
        {"Unnamed: 0": "0", "text": "007", "label": "NaN"},
        {"Unnamed: 0": "1", "text": "", "label": "true"},
    ]


def test_first_line_of_csv_is_the_header_whatever_it_says(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes(b"a text,1\nanother,2\n")
    assert [row.fields for row, _ in read_files([file])] == [{"a text": "another", "1": "2"}]


def test_commas_in_a_tsv_of_one_column_are_text(tmp_path):
    for name, content in (("rows.tsv", b"text\na, b\n"), ("rows.csv", b'text\n"a, b"\n')):
        (tmp_path / name).write_bytes(content)
        assert [row.fields for row, _ in read_files([tmp_path / name])] == [{"text": "a, b"}]


def test_numbers_that_are_not_finite_are_taken_from_json(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"score": NaN}\n{"score": -Infinity}\n')
    first, second = (row.fields["score"] for row, _ in read_files([file]))
    assert first != first and second == float("-inf")


def test_rows_are_read_one_by_one_and_no_file_before_its_turn(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    steps = read_files([tmp_path / "a.jsonl", tmp_path / "missing.jsonl"])
    assert next(steps)[1] == Position(0, len(GOOD), 1)
    with pytest.raises(UserError, match=r"missing\.jsonl cannot be read"):
        next(steps)


BOUNDS = [None, 0, 1, 3, 7, 100, -1, -4, -7, -100]


@pytest.mark.parametrize("num_rows", [0, 1, 7, 50])
def test_split_cuts_rows_as_a_slice_of_a_list(num_rows):
    rows = list(range(num_rows))
    for start in BOUNDS:
        for stop in BOUNDS:
            chosen = parse_split(f"train[{'' if start is None else start}:{'' if stop is None else stop}]")
            first, last = chosen.bounds(num_rows)
            assert rows[first:last] == rows[start:stop]
            assert chosen.needs_count == any((bound or 0) < 0 for bound in (start, stop))
            if not chosen.needs_count:
                first, last = chosen.bounds()
                assert rows[first:last] == rows[start:stop]


def test_split_in_percent_cuts_rows_as_the_library_does():
    from datasets import ReadInstruction

    draw = random.Random(0)
    for _ in range(500):
        start, stop = (draw.choice([None, draw.randint(-100, 100)]) for _ in range(2))
        split = f"train[{'' if start is None else f'{start}%'}:{'' if stop is None else f'{stop}%'}]"
        num_rows = draw.choice([0, 1, 3, 99, 101, 1_234_567])
        (expected,) = ReadInstruction.from_spec(split).to_absolute({"train": num_rows})
        first, last = parse_split(split).bounds(num_rows)
        assert range(first, last) == range(expected.from_, expected.to)


def test_folds_in_percent_share_out_every_row_once():
    for num_rows in (7, 95, 1000):
        folds = [parse_split(f"all[{low}%:{low + 10}%]").bounds(num_rows) for low in range(0, 100, 10)]
        assert [row for first, last in folds for row in range(first, last)] == list(range(num_rows))


def test_split_without_bounds_is_all_rows_under_any_name():
    for name in ("train", "validation", "my-set_2.b"):
        assert parse_split(name) == RowSlice(name)
        assert parse_split(name).bounds() == (0, None)
    assert parse_split("train[1_000:]").bounds() == (1000, None)


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("train+test", "local files have one split, so splits cannot be added"),
        ("train[10%:20]", "one bound is in percent and the other in rows"),
        ("train[:101%]", "percentages go from -100% to 100%"),
        ("train[-200%:]", "percentages go from -100% to 100%"),
        *((split, "not a split; write train, train") for split in (
            "", "[:10]", "train[5]", "train[", "train[:10", "train[a:b]", "train[1.5:]", "train[::2]", "train[%:]",
            "train[:10%](pct1_dropremainder)", "train test", "train[:5] extra",
        )),
    ],
)  # fmt: skip
def test_split_that_cannot_be_read_is_an_error_with_its_key(split, words):
    with pytest.raises(UserError) as caught:
        parse_split(split)
    assert str(caught.value).startswith(f"dataset.split={split}: ")
    assert words in str(caught.value)
