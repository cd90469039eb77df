"""Where rows come from: the embedded default, local files, the hub."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field, PositiveInt

from automodel.data.files.readers import count_rows, local_files, read_files
from automodel.data.files.split import parse_split
from automodel.data.formats.choose import FormatName
from automodel.data.formats.samples import TextLabel
from automodel.data.prepare.options import OnBadRow, PrepareOptions, Supervise, Truncation, smaller_limit
from automodel.data.rows import Position, ReadRow, Row
from automodel.data.source_checks import path_problems, row_problems
from automodel.types import UserError

if TYPE_CHECKING:
    from automodel.config import Config


class Source(Protocol):
    """What a section of the ``dataset`` group builds."""

    @property
    def display_name(self) -> str:
        """What the rows are called in messages."""

    def rows(self, *, samples: Collection[type] = ()) -> Iterable[ReadRow]:
        """Yield every row with its place, and a damaged one with its error.

        Args:
            samples: the types of sample that are wanted, for a source that can give several.
        """

    def identity(self) -> Any:
        """Return what tells these rows from others without reading them all, for JSON."""

    def num_bytes(self) -> int | None:
        """Return the size of the input, or None where it is not known."""

    def options(self, model_max_length: int | None) -> PrepareOptions:
        """Return what decides how a row is prepared, for a model that takes so many tokens."""


class RowStream:
    """Rows one by one, with the position of the next one, from which reading can resume later."""

    def __init__(self, rows: Iterator[ReadRow], position: Any) -> None:
        self._rows = rows
        self.position = position

    def __iter__(self) -> Iterator[ReadRow]:
        return self._rows


@dataclass(frozen=True)
class DemoDataset:
    """Exercises generated in code; what ``dataset=demo`` configures."""

    split: Literal["train", "validation"] = "train"
    limit: PositiveInt | None = None
    max_length: PositiveInt = 2048
    truncation: Truncation = "right"

    streaming = False
    is_stand_in = True

    @property
    def display_name(self) -> str:
        return f"demo {self.split}"

    def rows(self, *, samples: Collection[type] = ()) -> Iterable[ReadRow]:
        from automodel.data.demo import iter_demo_rows

        for number, row in enumerate(iter_demo_rows(self.split), start=1):
            fields = {"text": row["prompt"], "label": row["kind"]} if TextLabel in samples else row
            yield Row(f"{self.display_name}:{number}", fields)

    def identity(self) -> Any:
        import hashlib

        from automodel.data import demo

        with open(demo.__file__, "rb") as source:
            return ["demo", self.split, hashlib.sha256(source.read()).hexdigest()]

    def num_bytes(self) -> int | None:
        return None

    def options(self, model_max_length: int | None) -> PrepareOptions:
        return PrepareOptions(
            limit=self.limit,
            max_length=smaller_limit(self.max_length, model_max_length),
            truncation=self.truncation,
            is_model_limit=model_max_length is not None and model_max_length < self.max_length,
        )


@dataclass(frozen=True, kw_only=True)
class _RowKeys:
    """The keys that say what the rows of a file or of the hub become."""

    split: str = "train"
    validation_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    format: FormatName = "auto"
    columns: dict[str, str | None] = field(default_factory=dict)
    limit: PositiveInt | None = None
    on_bad_row: OnBadRow = "stop"
    max_length: PositiveInt = 2048
    truncation: Truncation = "right"
    supervise: Supervise = "all"
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    num_proc: PositiveInt | None = None
    streaming: bool = False
    buffer_rows: PositiveInt = 10_000

    @staticmethod
    def problems(section: dict[str, Any], cfg: Config, *, key: str, world_size: int) -> Iterator[str]:
        """Yield what does not fit together; see ``config/targets.py``."""
        yield from row_problems(section, cfg, key)

    def options(self, model_max_length: int | None) -> PrepareOptions:
        return PrepareOptions(
            limit=self.limit,
            max_length=smaller_limit(self.max_length, model_max_length),
            truncation=self.truncation,
            format=self.format,
            columns=self.columns,
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
            supervise=self.supervise,
            on_bad_row=self.on_bad_row,
            num_proc=self.num_proc,
            is_model_limit=model_max_length is not None and model_max_length < self.max_length,
        )


@dataclass(frozen=True, kw_only=True)
class FileDataset(_RowKeys):
    """Rows of local files; what ``dataset=file`` configures, also under its older name ``dataset=jsonl``."""

    path: str | list[str]

    @staticmethod
    def problems(section: dict[str, Any], cfg: Config, *, key: str, world_size: int) -> Iterator[str]:
        """Yield what does not fit together, and files that are not there; see ``config/targets.py``."""
        yield from path_problems(f"{key}.path", section.get("path"))
        yield from row_problems(section, cfg, key)

    @property
    def display_name(self) -> str:
        paths = self._paths()
        return paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"

    def rows(self, *, samples: Collection[type] = ()) -> Iterable[ReadRow]:
        start, stop = self._bounds()
        return (row for row, _ in islice(read_files(self._files()), start, stop))

    def stream(self, position: Any = None) -> RowStream:
        """Return the rows from ``position`` on, which an earlier stream of the same files gave."""
        start, stop = self._bounds()
        done, begin = (0, Position()) if position is None else (position[0], Position(*position[1]))
        stream = RowStream(iter(()), [done, list(begin)])

        def rows() -> Iterator[ReadRow]:
            for index, (row, after) in enumerate(read_files(self._files(), begin), start=done):
                if stop is not None and index >= stop:
                    return
                stream.position = [index + 1, list(after)]
                if index >= start:
                    yield row

        stream._rows = rows()
        return stream

    def identity(self) -> Any:
        stats = [(file.resolve(), file.stat()) for file in self._files()]
        return [
            self.split,
            [[str(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for file, stat in stats],
        ]

    def num_bytes(self) -> int | None:
        return sum(file.stat().st_size for file in self._files())

    def _paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    def _files(self) -> list[Path]:
        files: dict[Path, Path] = {}
        for path in self._paths():
            found = local_files(path)
            if not found:
                raise UserError(f"dataset.path={path} does not exist, or holds no file of rows")
            for file in found:
                if files.setdefault(file.resolve(), file) is not file:
                    raise UserError(f"dataset.path names {file} twice; its rows would count twice")
        return list(files.values())

    def _bounds(self) -> tuple[int, int | None]:
        chosen = parse_split(self.split)
        return chosen.bounds(count_rows(self._files()) if chosen.needs_count else None)


JsonlDataset = FileDataset
"""The name in configurations of earlier runs."""


@dataclass(frozen=True, kw_only=True)
class HFDataset(_RowKeys):
    """Rows of a data set on the hub; what ``dataset=hf`` configures."""

    path: str
    name: str | None = None
    revision: str | None = None

    @property
    def display_name(self) -> str:
        return f"{self.path}[{self.split}]"

    def rows(self, *, samples: Collection[type] = ()) -> Iterable[ReadRow]:
        return self._named(self._load(streaming=False), first=1)

    def stream(self, position: Any = None) -> RowStream:
        """Return the rows from ``position`` on, which an earlier stream of the same data set gave."""
        rows = self._load(streaming=True)
        done, state = position or (0, None)
        if state is not None:
            rows.load_state_dict(state)
        return _HubStream(self._named(rows, first=done + 1), rows, done)

    def identity(self) -> Any:
        return ["hub", self.path, self.name, self.revision, self.split, self._load(streaming=False)._fingerprint]

    def num_bytes(self) -> int | None:
        return None

    def _named(self, rows: Iterable[dict[str, Any]], *, first: int) -> Iterator[ReadRow]:
        return (Row(f"{self.display_name}:{number}", row) for number, row in enumerate(rows, start=first))

    def _load(self, *, streaming: bool) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(self.path, self.name, split=self.split, revision=self.revision, streaming=streaming)
        except (OSError, ValueError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"dataset.path={self.path} cannot be loaded: {first}") from error


class _HubStream(RowStream):
    """Rows of a streamed hub data set, which keeps its own position."""

    def __init__(self, rows: Iterator[ReadRow], dataset: Any, done: int) -> None:
        self._rows, self._dataset, self._done = self._counted(rows), dataset, done

    def _counted(self, rows: Iterator[ReadRow]) -> Iterator[ReadRow]:
        for row in rows:
            self._done += 1
            yield row

    @property
    def position(self) -> Any:
        return [self._done, self._dataset.state_dict()]
