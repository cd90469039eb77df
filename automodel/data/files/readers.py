"""Read rows of the common files with the place of every row, so that a damaged one can be named and a run resumed."""

from __future__ import annotations

import csv
import glob
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from automodel.data.files.identify import BOM, DataFile, Kind, Lines, changed, identify, is_data_file, suffix_of
from automodel.data.files.json_document import DamagedDocument, walk_items
from automodel.data.rows import BadRow, Position, ReadRow, Row, type_in_words
from automodel.types import UserError

if TYPE_CHECKING:
    from pyarrow import RecordBatch
    from pyarrow.parquet import ParquetFile


_Step = tuple[ReadRow, int, int]  # a row, and the offset and line behind it

_NUM_ROWS_A_BATCH = 128  # of Parquet: few enough for rows of a megabyte


def local_files(path: str) -> list[Path]:
    """Return the files that a path, a folder (its data files that are not hidden) or a glob names, sorted.

    Raises:
        UserError: it may not be read.
    """
    folder = Path(path).expanduser()
    try:
        if folder.is_file():
            return [folder]
        if folder.is_dir():
            return sorted(file for file in folder.iterdir() if is_data_file(file) and file.is_file())
        return sorted(Path(name) for name in glob.glob(str(folder), recursive=True) if Path(name).is_file())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def read_files(files: Sequence[Path], start: Position = Position()) -> Iterator[tuple[ReadRow, Position]]:  # noqa: B008
    """Yield every row from ``start`` on with the position after it; for a damaged one, its place and the error.

    A file is recognised by its content: JSON Lines, a JSON array of objects (or an object with such an array named
    data, rows or examples), CSV with a header line, plain text (a row of the one field ``text`` for each line that is
    not blank), Parquet, or gzip of these. Values of CSV are text. NaN and Infinity in JSON, which Python writes for
    missing numbers, are taken as numbers. A first line of CSV is always taken as its header.

    Memory holds a row at a time, of Parquet a batch of rows, of a JSON document its whole text.
    Resuming seeks; in gzip it unpacks what is before, parsing nothing.

    Raises:
        UserError: a file cannot be read, or not to its end (after its rows before the damage), or has changed.
    """
    for index in range(start.file, len(files)):
        source = identify(files[index])
        first = start if index == start.file else Position()
        if source.kind == "empty":
            continue
        for row, offset, line in _READERS[source.kind](source, first):
            yield row, Position(index, offset, line)


def count_rows(files: Sequence[Path]) -> int:
    """Return how many rows ``read_files`` yields, damaged ones included, parsing only what must be.

    Raises:
        UserError: a file cannot be read to its end.
    """
    return sum(_count(identify(file)) for file in files)


def _count(source: DataFile) -> int:
    if source.kind == "empty":
        return 0
    if source.kind == "parquet":
        with source.opened_for_seeking() as stream:
            return _parquet(source, stream).metadata.num_rows
    if source.kind in ("json_lines", "text"):
        with source.opened() as stream:
            is_first_a_row = stream.readline().removeprefix(BOM).strip() != b""
            return is_first_a_row + sum(not line.isspace() for line in stream)
    return sum(1 for _ in _READERS[source.kind](source, Position()))


def _checked(place: str, parse: Callable[[Any], dict[str, Any]], value: Any) -> ReadRow:
    try:
        return Row(place, parse(value))
    except BadRow as error:
        return place, error


def _line_rows(source: DataFile, start: Position, parse: Callable[[bytes], dict[str, Any]]) -> Iterator[_Step]:
    with source.opened() as stream:
        lines = Lines(source.path, stream, offset=start.offset, number=start.line)
        for line in lines:
            if line and not line.isspace():
                yield _checked(f"{source.path}:{lines.number}", parse, line), lines.offset, lines.number


def _json_rows(source: DataFile, start: Position) -> Iterator[_Step]:
    return _line_rows(source, start, _parse_json)


def _text_rows(source: DataFile, start: Position) -> Iterator[_Step]:
    return _line_rows(source, start, lambda line: {"text": _utf8(line).rstrip("\r\n")})


def _utf8(line: bytes) -> str:
    if line.startswith(BOM):  # the first line of a file has lost its own
        raise BadRow("begins with a byte order mark, as where files were joined; remove it")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 (byte {error.start + 1} of the line); convert the file to UTF-8") from None


def _parse_json(line: bytes) -> dict[str, Any]:
    text = _utf8(line)
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        hint = ""
        if text[error.pos :].strip() == ",":
            hint = ": remove the comma behind the object"
        elif error.msg == "Extra data" and text[error.pos] == "{":
            hint = ": write each object on a line of its own"
        elif error.msg.startswith("Invalid control character"):
            hint = r": within text write it as an escape, such as \n or \t"
        elif not line.endswith(b"\n"):
            hint = "; the file ends in this line, is it complete?"
        raise BadRow(f"not JSON: {_reason(error)} at column {error.colno}{hint}") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(_unusable(error)) from None
    return _object(fields)


def _reason(error: json.JSONDecodeError) -> str:
    return error.msg.removesuffix(" at")  # "Unterminated string starting at"


def _unusable(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "not usable: nested too deeply"
    return f"not usable: {str(error).partition(';')[0]}"  # Python refuses whole numbers of thousands of digits


def _object(fields: Any) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise BadRow(f"a row must be a JSON object, not {type_in_words(fields)}")
    return fields


def _document_rows(source: DataFile, start: Position) -> Iterator[_Step]:
    with source.opened() as stream:
        content = stream.read().removeprefix(BOM)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = error.start - content.rfind(b"\n", 0, error.start)
        raise UserError(
            f"{source.path}:{line}: not UTF-8 (byte {byte} of the line); convert the file to UTF-8"
        ) from None
    if start.offset > len(text):
        raise changed(source.path)
    try:
        for item in walk_items(text, end=start.offset, num_lines=start.line):
            yield _checked(f"{source.path}:{item.place}", _object, item.value), item.end, item.num_lines
    except DamagedDocument as error:
        raise UserError(f"{source.path}:{error.line}:{error.column}: {error}") from None


class _DecodedLines:
    """Lines for the reader of CSV; remembers what was not UTF-8 until it is asked for."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._problem: BadRow | None = None

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            try:
                yield _utf8(line)
            except BadRow as problem:
                self._problem = self._problem or problem
                yield line.decode("utf-8", errors="replace")

    def take_problem(self) -> BadRow | None:
        problem, self._problem = self._problem, None
        return problem


def _csv_rows(source: DataFile, start: Position) -> Iterator[_Step]:
    csv.field_size_limit(2**31 - 1)  # the process has one limit, which at first refuses more than 128 KiB
    with source.opened() as stream:
        lines = Lines(source.path, stream)
        decoded = _DecodedLines(lines)
        first = next((line for line in decoded if line.strip()), None)
        if first is None:
            return
        place = f"{source.path}:{lines.number}"
        records = csv.reader(chain([first], decoded), delimiter=_delimiter(first, source.path), strict=True)
        try:
            header = _header(next(records))
            if problem := decoded.take_problem():
                raise problem
        except (csv.Error, BadRow) as error:
            raise UserError(f"{place}: the header line: {_csv_reason(error)}") from None
        if start.offset:
            lines.go_to(offset=start.offset, number=start.line)
        while True:
            place = f"{source.path}:{lines.number + 1}"
            try:
                record = next(records, None)
                problem = decoded.take_problem()
            except csv.Error as error:
                if "end of data" in str(error):
                    raise UserError(f"{place}: a quoted field begins in this row and never ends; close it") from None
                record, problem = [], BadRow(_csv_reason(error))
                decoded.take_problem()
            if record is None:
                return
            if problem is not None:
                yield (place, problem), lines.offset, lines.number
            elif len(record) > 1 or (record and record[0].strip()):
                yield _checked(place, partial(_csv_fields, header), record), lines.offset, lines.number


def _delimiter(header: str, path: Path) -> str:
    num_fields = {delimiter: len(next(csv.reader([header], delimiter=delimiter))) for delimiter in "\t,;"}
    if max(num_fields.values()) == 1:
        return "\t" if suffix_of(path) == ".tsv" else ","
    return max(num_fields, key=num_fields.__getitem__)  # of equals the tab: names seldom hold one


def _header(record: list[str]) -> list[str]:
    names = [name.strip() or f"Unnamed: {index}" for index, name in enumerate(record)]  # as pandas calls them
    repeated = sorted(name for name, number in Counter(names).items() if number > 1)
    if repeated:
        raise BadRow(f"the column name {', '.join(repeated)} stands there more than once; give each column its own")
    return names


def _csv_fields(header: list[str], record: list[str]) -> dict[str, str]:
    if len(record) != len(header):
        raise BadRow(f"expected {len(header)} fields ({', '.join(header)}), found {len(record)}")
    return dict(zip(header, record, strict=True))


def _csv_reason(error: Exception) -> str:
    if "new-line character" in str(error):
        return "not CSV: a field without quotes holds a carriage return; put the field in quotes"
    if "expected after" in str(error):
        return "not CSV: a field continues after its closing quote; write a quote inside a field twice"
    if "end of data" in str(error):
        return "a quoted field begins in this row and never ends; close it"
    return str(error)


def _parquet(source: DataFile, stream: BinaryIO) -> ParquetFile:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        # By default a whole column of a row group is read at once.
        parquet = ParquetFile(stream, buffer_size=1 << 20, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise _bad_parquet(source.path, error) from error
    names = parquet.schema_arrow.names
    if len(set(names)) < len(names):
        raise UserError(f"{source.path}: columns of the same name: {', '.join(names)}; give each column its own")
    return parquet


def _bad_parquet(path: Path, error: Exception, *, after: str = "") -> UserError:
    reason = str(error).splitlines()[0].rstrip(".")
    return UserError(f"{path}: the Parquet file is cut off or damaged{after} ({reason}); copy or write it again")


def _parquet_rows(source: DataFile, start: Position) -> Iterator[_Step]:
    import pyarrow

    with source.opened_for_seeking() as stream:
        parquet = _parquet(source, stream)
        if start.offset > parquet.metadata.num_rows:
            raise changed(source.path)
        number = 0
        for group in range(parquet.num_row_groups):
            if number + parquet.metadata.row_group(group).num_rows <= start.offset:
                number += parquet.metadata.row_group(group).num_rows
                continue
            batches = parquet.iter_batches(batch_size=_NUM_ROWS_A_BATCH, row_groups=[group])
            while True:
                try:
                    batch = next(batches, None)
                except (pyarrow.ArrowException, OSError) as error:
                    raise _bad_parquet(source.path, error, after=f" after row {number}") from error
                if batch is None:
                    break
                skipped = min(batch.num_rows, max(0, start.offset - number))
                number += skipped
                for fields in _batch_rows(batch.slice(skipped)):
                    number += 1
                    place = f"{source.path}:row {number}"
                    yield (place, fields) if isinstance(fields, BadRow) else Row(place, fields), number, 0


def _batch_rows(batch: RecordBatch) -> Iterator[dict[str, Any] | BadRow]:
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:  # before any row was yielded: find out which row it is
        pass
    for index in range(batch.num_rows):
        try:
            yield batch.slice(index, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield BadRow("its text is not UTF-8; write the file again")


_READERS: dict[Kind, Callable[[DataFile, Position], Iterator[_Step]]] = {
    "json_lines": _json_rows,
    "json_document": _document_rows,
    "csv": _csv_rows,
    "text": _text_rows,
    "parquet": _parquet_rows,
}
