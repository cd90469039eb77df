"""What a damaged file is told to its user: each message names the place and says what to do."""

import gzip
import io
import json
import pickle
import random
import zipfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from automodel.data.files.readers import count_rows, read_files
from automodel.data.rows import BadRow, Position, Row, require_text
from automodel.types import UserError

GOOD = b'{"text": "a"}\n'


def parquet_bytes(columns: dict | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns or {"text": [f"row {n}" for n in range(1000)]}), buffer, **options)
    return buffer.getvalue()


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("rows.jsonl", GOOD)
    return buffer.getvalue()


def arrow_bytes() -> bytes:
    table = pyarrow.table({"text": ["a"]})
    buffer = io.BytesIO()
    with pyarrow.ipc.new_file(buffer, table.schema) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def with_two_columns_of_a_name() -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), buffer)
    return buffer.getvalue()


def with_broken_text() -> bytes:
    column = pyarrow.array([b"a", b"caf\xe9"]).view(pyarrow.string())
    return parquet_bytes({"text": column})


def damaged_pages() -> bytes:
    content = bytearray(parquet_bytes(compression="zstd"))
    content[20:400] = bytes(380)
    return bytes(content)


ROWS = b"".join(b'{"text": "%d and more of it"}\n' % (n * 7919) for n in range(5000))


def zipped(data: bytes) -> bytes:
    """Return ``data`` in gzip, without the time: it becomes part of a test's name."""
    return gzip.compress(data, mtime=0)


PACKED = zipped(ROWS)
IN_LINES = b"".join(b'{"text": "%d"}\n' % n for n in range(3))
DEEP = b'{"text": ' + b"[" * 100_000

# name of the file, its bytes, the place its message begins with, and words of the message
DAMAGED = [
    ("truncated.jsonl", GOOD + b'{"text": "b', ":2: ", "Unterminated string starting at column 10; the file ends in"),
    ("number.jsonl", GOOD + b'{"text": 3}\n', ":2: ", 'the field "text" must be text, not a number'),
    ("null_field.jsonl", GOOD + b'{"text": null}\n', ":2: ", 'the field "text" must be text, not null'),
    ("nan.jsonl", b'{"text": NaN}\n', ":1: ", 'the field "text" must be text, not NaN (a missing number)'),
    ("null.jsonl", b"null\n" + GOOD, ":1: ", "a row must be a JSON object, not null"),
    ("lists.jsonl", b'["a"]\n["b"]\n', ":1: ", "a row must be a JSON object, not a list"),
    ("strings.jsonl", b'"a"\n"b"\n', ":1: ", "a row must be a JSON object, not text"),
    ("raw_nul.jsonl", GOOD * 9 + b'{"text": "a\x00b"}\n', ":10: ", "not JSON: Invalid control character at column 12"),
    ("escaped_nul.jsonl", b'{"text": "a\\u0000"}\n', ":1: ", "holds a NUL character"),
    ("surrogate.jsonl", b'{"text": "\\ud83d"}\n', ":1: ", "holds half of a surrogate pair"),
    ("latin_1.jsonl", GOOD + b'{"text": "caf\xe9"}\n', ":2: ", "not UTF-8 (byte 14 of the line)"),
    (
        "joined.jsonl",
        GOOD + b"\xef\xbb\xbf" + GOOD,
        ":2: ",
        "begins with a byte order mark, as where files were joined",
    ),
    (
        "tab.jsonl",
        b'{"text": "a\tb"}\n',
        ":1: ",
        r"Invalid control character at column 12: within text write it as an escape, such as \n or \t",
    ),
    ("commas.jsonl", b'{"text": "a"},\n{"text": "b"},\n', ":1: ", "column 14: remove the comma behind the object"),
    ("quotes.jsonl", b"{'text': 'a'}\n", ":1: ", "Expecting property name enclosed in double quotes at column 2"),
    ("deep.jsonl", GOOD + DEEP, ":2: ", "not usable: nested too deeply"),
    ("first_deep.jsonl", DEEP + b"\n", ":1:10: ", "not usable: nested too deeply"),
    ("huge.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", ":1: ", "not usable: Exceeds the limit (4300 digits)"),
    (
        "two.jsonl",
        b'{"text": "a"} {"text": "b"}\n',
        ":1: ",
        "not JSON: Extra data at column 15: write each object on a line",
    ),
    (
        "megabyte.jsonl",
        GOOD + b'{"text": "' + b"x" * 2**20 + b"\n",
        ":2: ",
        "Invalid control character at column 1048587",
    ),
    (
        "old_mac.jsonl",
        b'{"text": "a"}\r{"text": "b"}\r',
        "",
        r"its lines end in CR alone; convert them to LF: tr '\r' '\n'",
    ),
    ("old_mac.txt", b"a\rb\r", "", "its lines end in CR alone"),
    ("old_mac.csv", b"text,label\ra,b\r", "", "its lines end in CR alone"),
    ("utf_16.jsonl", GOOD.decode().encode("utf-16"), "", "is UTF-16; convert it to UTF-8: iconv -f UTF-16 -t UTF-8"),
    ("no_mark.csv", "text,label\na,b\n".encode("utf-16-be"), "", "looks like UTF-16BE; convert it to UTF-8: iconv"),
    ("utf_32.txt", "some text\n".encode("utf-32"), "", "is UTF-32; convert it to UTF-8"),
    ("rows.jsonl", zip_bytes(), "", "is a zip archive (.zip, .xlsx, .npz and .pt are such); unpack it"),
    ("rows.txt", pickle.dumps({"text": "a"}), "", "is a Python pickle; export its rows as JSON Lines or Parquet"),
    ("rows.json", arrow_bytes(), "", "is an Arrow file; write it as Parquet"),
    ("noise.txt", bytes(range(256)) * 20, "", "looks like binary data"),
    ("zeros.jsonl", bytes(500), "", "looks like binary data"),
    ("page.jsonl", b"<!DOCTYPE html>\n<html>\n", "", "is a web page; download the file itself"),
    (
        "lfs.parquet",
        b"version https://git-lfs.github.com/spec/v1\n",
        "",
        "is a pointer of Git LFS and not the file itself",
    ),
    ("rows.dat", b"neither this nor that\n", "", "cannot tell what its rows are; name it .jsonl"),
    (
        "element.json",
        b'[{"text": "a"},\n {"text": },\n {"text": "c"}]',
        ":2:11: ",
        "not JSON: Expecting value",
    ),
    ("numbers.json", b"[1, 2]", ":1: ", "a row must be a JSON object, not a number"),
    ("list_item.json", b'[{"text": "a"}, []]', ":1:17: ", "a row must be a JSON object, not a list"),
    (
        "open.json",
        b'[{"text": "a"},\n{"text": "b"}',
        ":2:14: ",
        "the file ends before the closing ]; is it complete?",
    ),
    ("half.json", b'[{"text": "a"},\n{"text":', ":2:9: ", "the file ends here, is it complete?"),
    ("comma.json", b'[{"text": "a"},]', ":1:15: ", "a comma stands before the end of the array; remove it"),
    ("no_comma.json", b'[{"text": "a"}\n{"text": "b"}]', ":2:1: ", "Expecting ',' or ']'"),
    ("arrays.json", b'[\n{"text": "a"}]\n[\n{"text": "b"}]', ":3:1: ", "the file continues after the end of its array"),
    (
        "latin_1.json",
        b'[{"text": "a"},\n{"text": "caf\xe9"}]',
        ":2: ",
        "not UTF-8 (byte 14 of the line); convert the file",
    ),
    ("deep.json", b"[" * 100_000, ":1:2: ", "not usable: nested too deeply"),
    ("huge.json", b'[{"text": ' + b"9" * 5000 + b"}]", ":1:2: ", "not usable: Exceeds the limit"),
    (
        "object.json",
        b'{\n "text": "a"\n}\n',
        ":1:1: ",
        "is one JSON object without a list of rows under exactly one of data,",
    ),
    ("pretty.json", b'{\n "text": "a"\n}\n{\n "text": "b"\n}\n', ":4:1: ", "write each on one line: jq -c . FILE"),
    ("ragged.csv", b'text,label\na,b\n"c\nd",e\nf\n', ":5: ", "expected 2 fields (text, label), found 1"),
    ("long.tsv", b"text\tlabel\na\tb\tc\n", ":2: ", "expected 2 fields (text, label), found 3"),
    ("twice.csv", b"text,label,text\na,b,c\n", ":1: ", "the column name text stands there more than once"),
    ("latin_1.csv", b"text,label\na,b\ncaf\xe9,c\n", ":3: ", "not UTF-8 (byte 4 of the line)"),
    ("latin_1_header.csv", b"text,caf\xe9\na,b\n", ":1: ", "the header line: not UTF-8 (byte 9 of the line)"),
    (
        "open_quote.csv",
        b'text,label\na,b\n"c,d\ne,f\n',
        ":3: ",
        "a quoted field begins in this row and never ends; close it",
    ),
    ("open_header.csv", b'"text,label\na,b\n', ":1: ", "the header line: a quoted field begins in this row and never"),
    ("quote.csv", b'text,label\n"a" b,c\n', ":2: ", "write a quote inside a field twice"),
    ("cr.csv", b"text,label\na\rb,c\n", ":2: ", "a field without quotes holds a carriage return"),
    ("joined.csv", b"text,label\na,b\n\xef\xbb\xbftext,label\n", ":3: ", "begins with a byte order mark"),
    ("nul.csv", b"text,label\na\x00b,this is some longer text\n", ":2: ", "holds a NUL character"),
    ("latin_1.txt", b"text\ncaf\xe9\n", ":2: ", "not UTF-8 (byte 4 of the line)"),
    ("cut.jsonl.gz", PACKED[: len(PACKED) // 2], ": ", "the gzip stream ends early after line"),
    (
        "cut.json.gz",
        zipped(b"[" + ROWS[:-1].replace(b"\n", b",\n") + b"]")[:-4],
        ": ",
        "the gzip stream ends early",
    ),
    (
        "cut.csv.gz",
        zipped(b"text\n" + ROWS.replace(b'"', b""))[:9000],
        ": ",
        "the gzip stream ends early after line",
    ),
    ("header_alone.jsonl.gz", PACKED[:10], ": ", "the gzip stream ends early"),
    ("flipped.jsonl.gz", PACKED[:-8] + bytes(4) + PACKED[-4:], ": ", "the gzip stream is damaged after line 5000 (CRC"),
    ("twice.jsonl.gz", zipped(PACKED), "", "is gzip inside gzip; unpack it once"),
    ("cut.parquet", parquet_bytes()[:-100], ": ", "the Parquet file is cut off or damaged ("),
    ("four.parquet", b"PAR1", ": ", "the Parquet file is cut off or damaged ("),
    ("empty.parquet", b"", "", "is no Parquet file: it is empty; copy or write it again"),
    ("text.parquet", GOOD, "", """is no Parquet file: it begins with b'{"text":' and not with b'PAR1'"""),
    ("pages.parquet", damaged_pages(), ": ", "the Parquet file is cut off or damaged after row 0"),
    ("names.parquet", with_two_columns_of_a_name(), "", "columns of the same name: text, text"),
    ("latin_1.parquet", with_broken_text(), ":row 2: ", "its text is not UTF-8"),
    ("dates.parquet", parquet_bytes({"text": [b"a"]}), ":row 1: ", 'the field "text" must be text, not bytes'),
]


def first_problem(file: Path) -> str:
    """Return what is told of the first damage, by the reader or, of a field, by what takes its text."""
    try:
        for (place, fields), _ in read_files([file]):
            try:
                if isinstance(fields, BadRow):
                    raise fields
                for name in fields:
                    require_text(fields[name], name)
            except BadRow as problem:
                return f"{place}: {problem}"
    except UserError as error:
        return str(error)
    raise AssertionError("no damage was found")


@pytest.mark.parametrize(("name", "content", "place", "words"), DAMAGED, ids=[case[0] for case in DAMAGED])
def test_damaged_file_is_told_with_its_place_and_what_to_do(tmp_path, name, content, place, words):
    file = tmp_path / name
    file.write_bytes(content)
    message = first_problem(file)
    assert message.startswith(f"{file}{place}")
    assert words in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((f"empty{suffix}", b"") for suffix in (".jsonl", ".json", ".csv", ".tsv", ".txt", ".jsonl.gz", ".json.gz")),
        ("packed.jsonl.gz", zipped(b"")),
        ("packed.csv.gz", zipped(b"\n\n")),
        ("mark.jsonl", b"\xef\xbb\xbf"),
        ("blank.txt", b"\n  \r\n\t\n"),
        ("blank.csv", b"\n" * 70_000),
        ("array.json", b"[\n]\n"),
        ("object.json", b'{"version": 1,\n "data": []}'),
        ("header.csv", b"text,label\n"),
        ("rows.parquet", parquet_bytes({"text": pyarrow.array([], pyarrow.string())})),
    ],
)
def test_file_without_rows_yields_none(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    assert list(read_files([file])) == []
    assert count_rows([file]) == 0


def test_rows_before_the_end_of_a_cut_gzip_stream_are_read(tmp_path):
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(PACKED[: len(PACKED) // 2])
    rows = []
    with pytest.raises(UserError, match="ends early after line") as caught:
        rows.extend(row for row, _ in read_files([file]))
    expected = [json.loads(line) for line in ROWS.splitlines()]
    assert f"after line {len(rows)};" in str(caught.value)
    assert 1000 < len(rows) < 4000 and [row.fields for row in rows] == expected[: len(rows)]


def test_damaged_row_does_not_end_the_reading(tmp_path):
    contents = {"rows.jsonl": GOOD + b"{\n" + GOOD, "rows.csv": b'text,label\na,b\n"a" b,c\nd\ne,f\n'}
    for name, content in contents.items():
        file = tmp_path / name
        file.write_bytes(content)
        rows = [row for row, _ in read_files([file])]
        assert isinstance(rows[0], Row) and isinstance(rows[-1], Row)
        assert all(isinstance(problem, BadRow) for _, problem in rows[1:-1])
        assert count_rows([file]) == len(rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz"])
def test_row_of_a_megabyte_is_read(tmp_path, suffix):
    text = "x" * 2**20
    contents = {
        ".jsonl": json.dumps({"text": text}).encode(),
        ".json": json.dumps([{"text": text}]).encode(),
        ".csv": f"text\n{text}\n".encode(),
        ".txt": text.encode(),
        ".parquet": parquet_bytes({"text": [text]}),
        ".jsonl.gz": zipped(json.dumps({"text": text}).encode()),
    }
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(contents[suffix])
    ((row, _),) = read_files([file])
    assert row.fields == {"text": text}


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "."])
def test_file_that_cannot_be_opened_is_a_plain_error(tmp_path, name):
    with pytest.raises(UserError, match="cannot be read: "):
        list(read_files([tmp_path / name]))


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json", ".parquet", ".jsonl.gz"])
def test_resuming_in_a_file_that_became_shorter_is_an_error(tmp_path, suffix):
    file = tmp_path / f"rows{suffix}"
    content = parquet_bytes({"text": ["a"]}) if suffix == ".parquet" else GOOD
    file.write_bytes(zipped(content) if suffix.endswith(".gz") else content)
    with pytest.raises(UserError, match="has changed since the position in it was saved"):
        list(read_files([file], Position(0, 1000, 50)))


def test_resuming_within_a_line_is_an_error(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD * 3)
    with pytest.raises(UserError, match="has changed since"):
        list(read_files([file], Position(0, len(GOOD) + 2, 1)))


MARKS = [b'"', b"[", b"]", b"{", b"}", b",", b"\0", b"\r", b"\n", b"\xff", b"\xef\xbb\xbf"]
LINES = b"".join(b'{"text": "%d", "label": "a"}\n' % number for number in range(20))
SOUND = {
    "rows.jsonl": LINES,
    "rows.json": b"[" + LINES[:-1].replace(b"\n", b",\n") + b"]",
    "object.json": b'{"data": [' + LINES[:-1].replace(b"\n", b",\n") + b"]}",
    "rows.csv": b"text,label\n" + b'"one\ntwo",b\nthree,c\n' * 10,
    "rows.txt": LINES,
    "rows.parquet": parquet_bytes({"text": [str(number) for number in range(20)]}),
    "rows.jsonl.gz": zipped(LINES),
    "rows.parquet.gz": zipped(parquet_bytes()),
}


@pytest.mark.parametrize("name", SOUND)
def test_random_damage_ends_in_rows_or_a_told_problem_and_resuming_sees_the_same(tmp_path, name):
    draw = random.Random(0)
    file = tmp_path / name
    for _ in range(40):
        content = bytearray(SOUND[name])
        at = draw.randrange(len(content))
        end = draw.choice([at, at + 1, at + 20, len(content)])
        content[at:end] = draw.choice([b"", *MARKS])
        file.write_bytes(content)
        steps, problem = told(file, Position())
        if problem is None:
            assert count_rows([file]) == len(steps)
        if steps:
            number = draw.randrange(len(steps))
            position = Position(*steps[number][1:])
            assert told(file, position) == (steps[number + 1 :], problem)


def told(file: Path, start: Position) -> tuple[list[tuple], str | None]:
    steps = []
    try:
        for (place, fields), position in read_files([file], start):
            steps.append((f"{place}: {fields}", *position))
    except UserError as error:
        return steps, str(error)
    return steps, None
