"""Tell from its first bytes what a data file is, refuse what holds no rows, and read its lines."""

from __future__ import annotations

import codecs
import gzip
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from automodel.config.paths import ROW_SUFFIXES
from automodel.data.files.json_document import ROW_LIST_NAMES
from automodel.types import UserError

Kind = Literal["empty", "json_lines", "json_document", "csv", "text", "parquet"]

BOM = codecs.BOM_UTF8
_ABOUT_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that the library ``datasets`` puts beside rows."""
HEAD_BYTES = 65536  # enough to tell a kind, and little enough to be read again

_NAME_OF_SUFFIX: dict[str, Kind] = {
    ".jsonl": "json_lines",
    ".json": "json_lines",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
}
_SIGNATURES = (
    (b"PK\x03\x04", "a zip archive (.zip, .xlsx, .npz and .pt are such)", "unpack it, or export its rows"),
    (b"\x1f\x8b", "gzip inside gzip", "unpack it once"),
    (b"BZh", "compressed with bzip2", "unpack it with bunzip2, or compress it with gzip"),
    (b"\xfd7zXZ\x00", "compressed with xz", "unpack it with unxz, or compress it with gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "unpack it with unzstd, or compress it with gzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (b"ARROW1", "an Arrow file", "write it as Parquet: datasets.Dataset.from_file(FILE).to_parquet(...)"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "write it as Parquet: datasets.Dataset.from_file(FILE).to_parquet(...)"),
    (b"SQLite format 3\x00", "a SQLite database", "export its table as CSV"),
    (b"\x89HDF\r\n", "an HDF5 file", "export its rows as JSON Lines or Parquet"),
    (b"%PDF-", "a PDF", "export its text"),
    (b"version https://git-lfs", "a pointer of Git LFS and not the file itself", "fetch the file with: git lfs pull"),
    (b"\xff\xfe\x00\x00", "UTF-32", "convert it to UTF-8: iconv -f UTF-32 -t UTF-8 FILE"),
    (b"\xff\xfe", "UTF-16", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8 FILE"),
    (b"\xfe\xff", "UTF-16", "convert it to UTF-8: iconv -f UTF-16 -t UTF-8 FILE"),
    *((bytes((0x80, version)), "a Python pickle", "export its rows as JSON Lines or Parquet") for version in range(6)),
)
_CONTROL_BYTES = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b"))


class DataFile(NamedTuple):
    """A file and what it was found to be."""

    path: Path
    kind: Kind
    is_gzip: bool

    @contextmanager
    def opened(self) -> Iterator[BufferedReader | gzip.GzipFile]:
        """Open the content, unpacked. Failures then, and while it is read, become a UserError."""
        try:
            with gzip.open(self.path, "rb") if self.is_gzip else self.path.open("rb", buffering=1 << 20) as stream:
                yield stream
        except (EOFError, zlib.error, OSError) as error:
            raise unreadable(self.path, error) from error

    @contextmanager
    def opened_for_seeking(self) -> Iterator[BinaryIO]:
        """Open the content for reads in any order: a packed file is unpacked to a temporary one."""
        with self.opened() as stream:
            if not self.is_gzip:
                yield stream
                return
            with tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(stream, unpacked, 1 << 20)
                unpacked.seek(0)
                yield unpacked


class Lines:
    """The lines of a stream, ended by LF, from ``offset`` on; knows the offset and number behind the latest one."""

    def __init__(self, path: Path, stream: BufferedReader | gzip.GzipFile, *, offset: int = 0, number: int = 0) -> None:
        self._path = path
        self._stream = stream
        self.offset = 0
        self.number = 0
        if offset:
            self.go_to(offset=offset, number=number)

    def go_to(self, *, offset: int, number: int) -> None:
        """Continue after line ``number``, which ends at byte ``offset``.

        Raises:
            UserError: no line ends there, so the file is not what it was.
        """
        self._stream.seek(offset - 1)
        last = self._stream.read(1)
        if not last or (last != b"\n" and self._stream.peek(1)):
            raise changed(self._path)
        self.offset, self.number = offset, number

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> bytes:
        try:
            line = self._stream.readline()
        except (EOFError, zlib.error, OSError) as error:
            raise unreadable(self._path, error, after=f"line {self.number}") from error
        if not line:
            raise StopIteration
        is_first = self.offset == 0
        self.offset += len(line)
        self.number += 1
        return line.removeprefix(BOM) if is_first else line


def unreadable(path: Path, error: Exception, *, after: str = "") -> UserError:
    """Return the error for a file that could not be read further."""
    place = f" after {after}" if after else ""
    if isinstance(error, EOFError):
        return UserError(f"{path}: the gzip stream ends early{place}; copy or pack the file again")
    if isinstance(error, (gzip.BadGzipFile, zlib.error)):
        return UserError(f"{path}: the gzip stream is damaged{place} ({error}); copy or pack the file again")
    return UserError(f"{path} cannot be read{place}: {getattr(error, 'strerror', None) or error}")


def changed(path: Path) -> UserError:
    """Return the error for a file that does not reach the place to resume at."""
    return UserError(f"{path} has changed since the position in it was saved; restore the file, or start afresh")


def identify(path: Path) -> DataFile:
    """Return what ``path`` is, by its content and, where that leaves it open, by its name.

    Raises:
        UserError: it cannot be read, or is of a kind that holds no rows for us.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError as error:
        raise unreadable(path, error) from error
    is_gzip = head.startswith(b"\x1f\x8b")
    if is_gzip:
        try:  # unlike gzip's own reader, this gives what there is of a stream cut short
            head = zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
        except zlib.error as error:
            raise unreadable(path, error) from error
        if not head.strip():  # its first member may be empty, or it ends within its own header
            with DataFile(path, "empty", is_gzip).opened() as stream:
                head = stream.read(HEAD_BYTES)
    suffix = suffix_of(path)
    if head.startswith(b"PAR1"):
        return DataFile(path, "parquet", is_gzip)
    if suffix != ".parquet" and len(head) < HEAD_BYTES and not head.removeprefix(BOM).strip():
        return DataFile(path, "empty", is_gzip)
    _refuse(path, head, suffix=suffix)
    first, second = _first_lines(DataFile(path, "text", is_gzip))
    kind = _json_kind(first, second, is_named_json=suffix not in (".csv", ".tsv", ".txt"))
    kind = kind or _NAME_OF_SUFFIX.get(suffix)
    if kind is None:
        raise UserError(f"{path}: cannot tell what its rows are; name it .jsonl, .json, .csv, .tsv or .txt")
    if kind != "json_document" and b"\n" not in head and b"\r" in head.strip():
        raise UserError(rf"{path}: its lines end in CR alone; convert them to LF: tr '\r' '\n' <FILE >NEW")
    return DataFile(path, kind, is_gzip)


def suffix_of(path: Path) -> str:
    """Return the suffix in lower case, that before ``.gz`` if it has one."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def is_data_file(path: Path) -> bool:
    """Say whether a file of a folder is taken for rows."""
    return suffix_of(path) in ROW_SUFFIXES and not path.name.startswith(".") and path.name not in _ABOUT_DATASETS


def _refuse(path: Path, head: bytes, *, suffix: str) -> None:
    for signature, what, remedy in _SIGNATURES:
        if head.startswith(signature):
            raise UserError(f"{path} is {what}; {remedy}")
    if head[257:262] == b"ustar":
        raise UserError(f"{path} is a tar archive; unpack it")
    if suffix == ".parquet":
        what = f"begins with {head[:8]!r} and not with b'PAR1'" if head else "is empty"
        raise UserError(f"{path} is no Parquet file: it {what}; copy or write it again")
    if suffix != ".txt" and re.match(rb"\s*<(!doctype|html)", head, re.IGNORECASE):
        raise UserError(f"{path} is a web page; download the file itself (its raw form)")
    num_even, num_odd = (head[start::2].count(0) for start in (0, 1))
    if 8 * max(num_even, num_odd) > len(head) > 16 * min(num_even, num_odd):
        name = "UTF-16LE" if num_odd > num_even else "UTF-16BE"
        raise UserError(f"{path} looks like {name}; convert it to UTF-8: iconv -f {name} -t UTF-8 FILE")
    share = 1 - len(head.translate(None, _CONTROL_BYTES)) / len(head)
    if share > (0.3 if _is_utf8(head) else 0.05):  # random bytes have 0.1; a few in a damaged row are that row's fault
        raise UserError(f"{path} looks like binary data (it begins with {head[:8]!r}); export its rows as JSON Lines")


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return True


def _first_lines(data_file: DataFile) -> tuple[bytes, bytes]:
    """Return the first two lines that are not blank, stripped; b"" where there is none."""
    found = [b"", b""]
    try:
        with data_file.opened() as stream:
            lines = Lines(data_file.path, stream)
            for index in range(2):
                found[index] = next((line.strip() for line in lines if not line.isspace()), b"")
    except UserError:  # the reader of rows yields the rows before the damage, then raises
        if not found[0]:
            raise
    return found[0], found[1]


def _json_kind(first: bytes, second: bytes, *, is_named_json: bool) -> Kind | None:
    """Return the kind of JSON that lines are, None if they are no JSON."""
    text = first.decode("utf-8", errors="replace")
    if text.startswith("["):
        if not is_named_json and not re.match(rb'\[\s*\{\s*"', first + second):
            return None
        is_line_of_many = second and text.endswith("]") and isinstance(_begins_with(text), list)
        return "json_lines" if is_line_of_many else "json_document"
    if not text.startswith("{"):
        return None
    fields = _begins_with(text)
    if isinstance(fields, dict):
        is_document = not second and any(_is_row_list(fields.get(name)) for name in ROW_LIST_NAMES)
        return "json_document" if is_document else "json_lines"
    if not is_named_json:
        return None
    return "json_document" if text.endswith(("{", "[", ",")) else "json_lines"


def _begins_with(text: str) -> object:
    try:
        return json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return None


def _is_row_list(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
