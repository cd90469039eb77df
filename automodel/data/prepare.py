"""Turn rows into prepared sets on disk: read, recognise, tokenise, cut, and count what became of each row."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from automodel.data.cache import build_once
from automodel.data.chat import set_chat_template
from automodel.data.formats import (
    FormatName,
    Messages,
    PlainText,
    PromptCompletion,
    RowFormat,
    TextLabel,
    UnknownFormat,
    choose_format,
)
from automodel.data.readers import MAX_PROBLEMS, BadRow, Row, raise_problems
from automodel.data.rows import ClassificationRows, Prompts, RowCounts, RowStats, SFTRows
from automodel.data.tokenize import (
    Supervise,
    Tokens,
    Truncation,
    cut,
    require_eos,
    shifted_example,
    tokenize_input,
    tokenize_shape,
)
from automodel.logs import get_logger, progress
from automodel.types import IGNORE_INDEX, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = get_logger(__name__)

ReadRow = Row | tuple[str, BadRow]
OnBadRow = Literal["stop", "skip"]

_PREPARED_AS = 1
"""Raised when what is written to the cache changes, so that older folders are not taken for it."""
_CHUNK = 256
"""Rows that a process prepares at a time."""
_WORTH_PROCESSES = 64 * 2**20
"""Bytes of input from which several processes are quicker than the start of them is slow."""


@dataclass(frozen=True)
class PrepareOptions:
    """The keys of a dataset section that decide what a row becomes."""

    limit: int | None
    max_length: int
    truncation: Truncation
    format: FormatName = "auto"
    columns: Mapping[str, str | None] = field(default_factory=dict)
    chat_template: str | None = None
    supervise: Supervise = "all"
    on_bad_row: OnBadRow = "stop"
    num_proc: int | None = None


class Source(Protocol):
    """What a section of the ``dataset`` group builds."""

    @property
    def display_name(self) -> str:
        """What the rows are called in messages."""

    def rows(self, *, is_classification: bool) -> Iterable[ReadRow]:
        """Yield every row with its place, a damaged one as what is wrong with it."""

    def identity(self) -> Any:
        """Return what tells these rows from others without reading them all, for JSON."""

    def num_bytes(self) -> int | None:
        """Return the size of the input, or None where it is not known."""

    def options(self, model_max_length: int | None) -> PrepareOptions:
        """Return what decides how a row is prepared, for a model that takes so many tokens."""


class Prepared(NamedTuple):
    """What a row became: its example with all that is kept of it, or why it was dropped."""

    record: dict[str, Any] | None
    is_truncated: bool = False
    is_too_long: bool = False


@dataclass(frozen=True)
class SFTPreparer:
    """Prepares a row for a causal language model; the answers alone are supervised."""

    tokenizer: PreTrainedTokenizerBase
    format: RowFormat
    options: PrepareOptions
    keeps_prompts: bool

    def __call__(self, fields: Mapping[str, Any]) -> Prepared:
        shape = self.format.read(fields)
        tokens = tokenize_shape(self.tokenizer, shape, supervise=self.options.supervise)
        short = cut(tokens, max_length=self.options.max_length, truncation=self.options.truncation)
        if short is None:
            return Prepared(None, is_too_long=True)
        example = shifted_example(short)
        if example is None:
            return Prepared(None)
        record = {
            **example,
            "num_supervised": sum(label != IGNORE_INDEX for label in example["labels"]),
            "has_end": short.end is not None,
            "hash": _hash(example["input_ids"], example["labels"]),
        }
        record.setdefault("loss_weights", [])
        if self.keeps_prompts:
            record |= _prompt(shape, tokens, max_length=self.options.max_length)
        return Prepared(record, is_truncated=len(short.ids) < len(tokens.ids))


@dataclass(frozen=True)
class ClassificationPreparer:
    """Prepares a row for a sequence classifier."""

    tokenizer: PreTrainedTokenizerBase
    format: RowFormat
    options: PrepareOptions
    label_names: tuple[str, ...] | None

    def __call__(self, fields: Mapping[str, Any]) -> Prepared:
        shape: TextLabel = self.format.read(fields)
        names = self.label_names
        if names is not None and shape.label not in names:
            raise BadRow(f"label {shape.label!r} does not occur in the training set; its labels: {_some(names)}")
        before, ids, after = tokenize_input(self.tokenizer, shape.text)
        room = max(1, self.options.max_length - len(before) - len(after))
        tokens = cut(Tokens(ids, [0.0] * len(ids), 0), max_length=room, truncation=self.options.truncation)
        if tokens is None:
            return Prepared(None, is_too_long=True)
        whole = _without_trailing_pad(self.tokenizer, before + tokens.ids + after)
        record = {"input_ids": whole, "label": shape.label, "num_supervised": 1, "has_end": True}
        record["hash"] = _hash(whole, [])
        return Prepared(record, is_truncated=len(tokens.ids) < len(ids))


def load_sft(
    source: Source, tokenizer: PreTrainedTokenizerBase, *, model_max_length: int | None, keeps_prompts: bool = True
) -> SFTRows:
    """Prepare the rows of ``source`` for a causal language model, or take them from the cache.

    Where the rows are conversations, the tokenizer gets the chat template they were rendered with.

    Args:
        keeps_prompts: keep the prompts too, to generate answers to them.

    Raises:
        UserError: damaged rows (all of them counted, the first ones named), or none left.
    """
    require_eos(tokenizer)
    name, options = source.display_name, source.options(model_max_length)

    def prepare(row_format: RowFormat) -> SFTPreparer:
        set_template(tokenizer, row_format.name, options)
        return SFTPreparer(tokenizer, row_format, options, keeps_prompts)

    facts = _facts(source, tokenizer, options) | {"for": "causal language model", "prompts": keeps_prompts}
    columns = {"input_ids": "ids", "labels": "ids", "loss_weights": "weights"}
    if keeps_prompts:
        columns |= {"prompt_ids": "ids", "answer": "text", "question": "text", "kind": "text"}
    folder = build_once(
        facts, lambda folder: _Builder(source, options, folder, columns).build(prepare, is_classification=False)
    )
    meta, counts, stats = _read_meta(folder)
    set_template(tokenizer, meta["format"], options)
    _require_rows(name, options, counts, num_examples=len(stats.lengths))
    _log_counts(name, options, counts)
    table = _open(folder)
    names = ["input_ids", "labels"] + (["loss_weights"] if meta["has_weights"] else [])
    prompts = table.select_columns(["prompt_ids", "answer", "question", "kind"]) if keeps_prompts else []
    examples = table.select_columns(names)
    return SFTRows(name, examples, Prompts(prompts), meta["fingerprint"], counts, stats, meta["format"])


def load_classification(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    model_max_length: int | None,
    label_names: Sequence[str] | None = None,
) -> ClassificationRows:
    """Prepare the rows of ``source`` for a sequence classifier, or take them from the cache.

    Args:
        label_names: the labels of the training set, which validation rows must keep to; None collects them.

    Raises:
        UserError: damaged rows, an unknown label, or no rows.
    """
    import numpy as np

    name, options = source.display_name, source.options(model_max_length)
    names = None if label_names is None else tuple(label_names)

    def prepare(row_format: RowFormat) -> ClassificationPreparer:
        return ClassificationPreparer(tokenizer, row_format, options, names)

    facts = _facts(source, tokenizer, options) | {"for": "classifier", "labels": names}
    columns = {"input_ids": "ids", "label": "text"}
    folder = build_once(
        facts, lambda folder: _Builder(source, options, folder, columns).build(prepare, is_classification=True)
    )
    meta, counts, stats = _read_meta(folder)
    _require_rows(name, options, counts, num_examples=len(stats.lengths))
    _log_counts(name, options, counts)
    table = _open(folder)
    if names is None:
        names = _sorted_labels(set(table.unique("label")))
    if len(names) < 2:
        raise UserError(f"{name}: every row has the label {names[0]!r}; a classifier needs two labels or more")
    number = {label: index for index, label in enumerate(names)}
    labels = np.fromiter((number[label] for label in table["label"]), dtype=np.int32, count=len(table))
    examples = table.select_columns(["input_ids"]).add_column("labels", labels)
    return ClassificationRows(name, examples, names, meta["fingerprint"], counts, stats)


def choose_first(rows: Iterable[ReadRow], options: PrepareOptions, *, is_classification: bool) -> RowFormat | None:
    """Return the format that the first row that can be read has; None where there is no such row."""
    for place, fields in rows:
        if isinstance(fields, BadRow):
            continue
        try:
            return choose_format(options.format, options.columns, row=fields, is_classification=is_classification)
        except UnknownFormat as error:
            raise UserError(f"{place}: {error}") from error
    return None


class BadRows:
    """Collects what is wrong with rows, instead of stopping at the first, or skips them and counts."""

    def __init__(self, policy: OnBadRow, counts: RowCounts) -> None:
        self.policy, self.counts = policy, counts

    def add(self, place: str, error: BadRow) -> None:
        self.counts.num_bad += 1
        if len(self.counts.bad_rows) < MAX_PROBLEMS:
            self.counts.bad_rows.append(f"{place}: {error}")

    def settle(self, name: str) -> None:
        """Raise the problems found, or say that their rows are skipped."""
        if self.policy == "stop":
            raise_problems(self.counts.bad_rows, self.counts.num_bad)
        tell_skipped(name, self.counts)


def tell_skipped(name: str, counts: RowCounts) -> None:
    """Say which damaged rows were skipped, if any."""
    if counts.num_bad:
        first = "\n  ".join(counts.bad_rows)
        log.warning("%s: %d damaged rows are skipped, the first of them:\n  %s", name, counts.num_bad, first)


class _Builder:
    """Writes the prepared rows of a source into a folder."""

    def __init__(self, source: Source, options: PrepareOptions, folder: Path, columns: Mapping[str, str]) -> None:
        self.source, self.options, self.folder, self.columns = source, options, folder, columns
        self.counts = RowCounts()
        self.bad_rows = BadRows(options.on_bad_row, self.counts)
        self.hash = hashlib.sha256(_canonical(_deciding(options)))

    def build(self, prepare: Callable[[RowFormat], Any], *, is_classification: bool) -> None:
        """Prepare every row; raises UserError for damaged ones."""
        from datasets.arrow_writer import ArrowWriter

        rows = self.source.rows(is_classification=is_classification)
        row_format = choose_first(rows, self.options, is_classification=is_classification)
        stats = {"lengths": array("i"), "num_supervised": array("i"), "has_end": array("b"), "hashes": array("q")}
        has_weights = False
        if row_format is not None:
            preparer = prepare(row_format)
            with (
                closing(ArrowWriter(path=str(self.folder / "rows.arrow"), features=self._features())) as writer,
                progress(self.options.limit, description=f"preparing {self.source.display_name}") as bar,
            ):
                for number, (place, prepared) in enumerate(self._prepared(preparer, is_classification), start=1):
                    record = self._counted(place, prepared)
                    if record is None:
                        continue
                    has_weights |= bool(record.get("loss_weights"))
                    stats["lengths"].append(len(record["input_ids"]))
                    for key, column in (("num_supervised",) * 2, ("has_end",) * 2, ("hashes", "hash")):
                        stats[key].append(record[column])
                    writer.write({name: record[name] for name in self.columns})
                    bar.update(number, "")
                writer.finalize()
        self.bad_rows.settle(self.source.display_name)
        self._write_stats(stats)
        meta = {
            "format": row_format.name if row_format is not None else "",
            "fingerprint": self.hash.hexdigest()[:16],
            "has_weights": has_weights,
            "counts": dataclasses.asdict(self.counts),
        }
        (self.folder / "meta.json").write_text(json.dumps(meta))

    def _prepared(self, preparer: Any, is_classification: bool) -> Iterator[tuple[str, Prepared | BadRow]]:
        rows = islice(self.source.rows(is_classification=is_classification), self.options.limit)
        num_proc = self._num_proc()
        if num_proc == 1:
            for row in self._hashed(rows):
                yield _prepare_row(preparer, row)
            return
        # Started afresh: a fork would copy the threads' locks of whoever has a process group.
        context = multiprocessing.get_context("spawn")
        with context.Pool(num_proc, initializer=_start_worker, initargs=(preparer,)) as pool:
            for chunk in pool.imap(_prepare_chunk, _chunks(self._hashed(rows), _CHUNK)):
                yield from chunk

    def _num_proc(self) -> int:
        if self.options.num_proc is not None:
            return self.options.num_proc
        if self.options.limit is not None or (self.source.num_bytes() or 0) < _WORTH_PROCESSES:
            return 1
        return min(multiprocessing.cpu_count(), 16)

    def _hashed(self, rows: Iterable[ReadRow]) -> Iterator[ReadRow]:
        for place, fields in rows:
            if not isinstance(fields, BadRow):
                self.hash.update(_canonical(fields))
            yield place, fields

    def _counted(self, place: str, prepared: Prepared | BadRow) -> dict[str, Any] | None:
        self.counts.num_rows_read += 1
        if isinstance(prepared, BadRow):
            self.bad_rows.add(place, prepared)
            return None
        if prepared.record is None:
            self.counts.num_dropped += 1
            self.counts.num_unsupervised += not prepared.is_too_long
            return None
        self.counts.num_truncated += prepared.is_truncated
        self.counts.num_label_tokens += prepared.record["num_supervised"]
        return prepared.record

    def _write_stats(self, stats: Mapping[str, array]) -> None:
        import numpy as np

        dtypes = {"lengths": np.int32, "num_supervised": np.int32, "has_end": np.bool_, "hashes": np.int64}
        np.savez(self.folder / "stats.npz", **{name: np.array(stats[name], dtype=dtypes[name]) for name in dtypes})

    def _features(self) -> Any:
        from datasets import Features, List, Value

        kinds = {"ids": List(Value("int32")), "weights": List(Value("float32")), "text": Value("string")}
        return Features({name: kinds[kind] for name, kind in self.columns.items()})


_worker_preparer: Any = None


def _start_worker(preparer: Any) -> None:
    global _worker_preparer
    _worker_preparer = preparer


def _prepare_chunk(rows: list[ReadRow]) -> list[tuple[str, Prepared | BadRow]]:
    return [_prepare_row(_worker_preparer, row) for row in rows]


def _prepare_row(preparer: Any, row: ReadRow) -> tuple[str, Prepared | BadRow]:
    place, fields = row
    if isinstance(fields, BadRow):
        return place, fields
    try:
        return place, preparer(fields)
    except BadRow as error:
        return place, error


def _chunks(rows: Iterable[ReadRow], size: int) -> Iterator[list[ReadRow]]:
    rows = iter(rows)
    while chunk := list(islice(rows, size)):
        yield chunk


def _facts(source: Source, tokenizer: PreTrainedTokenizerBase, options: PrepareOptions) -> dict[str, Any]:
    """Return all that decides the prepared rows."""
    template = tokenizer.chat_template
    if options.chat_template is not None and Path(options.chat_template).is_file():
        template = Path(options.chat_template).read_text(encoding="utf-8", errors="replace")
    return {
        "prepared as": _PREPARED_AS,
        "rows": source.identity(),
        "options": _deciding(options) | {"on_bad_row": options.on_bad_row},
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": template,
    }


def _deciding(options: PrepareOptions) -> dict[str, Any]:
    """Return the options that change what the rows become."""
    left_out = ("num_proc", "on_bad_row")
    return {name: value for name, value in dataclasses.asdict(options).items() if name not in left_out}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the vocabulary, the rules and the special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inner = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    facts = [
        type(tokenizer).__name__,
        inner,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]
    return hashlib.sha256(_canonical(facts)).hexdigest()[:16]


def _canonical(value: Any) -> bytes:
    # A row of the hub may hold what JSON has no word for, such as a date.
    return json.dumps(value, sort_keys=True, default=str).encode()


def _hash(ids: Sequence[int], labels: Sequence[int]) -> int:
    digest = hashlib.blake2b(json.dumps([ids, labels]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def set_template(tokenizer: PreTrainedTokenizerBase, format_name: str, options: PrepareOptions) -> None:
    """Give ``tokenizer`` the chat template of ``options``, where rows of this format are rendered with one."""
    if format_name not in ("prompt_completion", "text", "text_label", ""):
        set_chat_template(tokenizer, options.chat_template)


def _read_meta(folder: Path) -> tuple[dict[str, Any], RowCounts, RowStats]:
    import numpy as np

    meta = json.loads((folder / "meta.json").read_text())
    with np.load(folder / "stats.npz") as stats:
        return meta, RowCounts(**meta["counts"]), RowStats(**dict(stats))


def _open(folder: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(folder / "rows.arrow"))


def _require_rows(name: str, options: PrepareOptions, counts: RowCounts, *, num_examples: int) -> None:
    """Raise UserError if nothing is left to train on."""
    if not counts.num_rows_read:
        raise UserError(f"dataset.path={name} holds no rows")
    if counts.num_bad == counts.num_rows_read:
        raise UserError(f"{name}: all {counts.num_bad} rows are damaged, such as {counts.bad_rows[0]}")
    if not num_examples:
        raise UserError(
            f"{name}: of all {counts.num_rows_read} rows nothing supervised is left within "
            f"dataset.max_length={options.max_length} tokens; raise it, or choose another truncation"
        )


def _log_counts(name: str, options: PrepareOptions, counts: RowCounts) -> None:
    """Say in one line what became of the rows."""
    log.info(
        "%s: %d rows, %d cut to %d tokens, %d dropped, %d supervised tokens",
        name, counts.num_rows_read, counts.num_truncated, options.max_length, counts.num_dropped,
        counts.num_label_tokens,
    )  # fmt: skip


def _prompt(
    shape: PromptCompletion | Messages | PlainText, tokens: Tokens, *, max_length: int
) -> dict[str, str | list[int] | None]:
    ids = tokens.ids[: tokens.num_prompt][-max_length:]  # the end of a prompt asks the question
    if isinstance(shape, PromptCompletion):
        return {"prompt_ids": ids, "answer": shape.completion, "question": shape.prompt, "kind": shape.kind}
    if isinstance(shape, PlainText):
        return {"prompt_ids": ids, "answer": shape.text, "question": "", "kind": None}
    turns = shape.turns
    weights = shape.weights or [None] * len(turns)
    answers = (i for i, turn in enumerate(turns) if turn["role"] == "assistant" and weights[i] != 0)
    last = max(answers, default=len(turns) - 1)
    question = turns[last - 1]["content"] if last else ""
    return {"prompt_ids": ids, "answer": turns[last]["content"], "question": question, "kind": None}


def _without_trailing_pad(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Drop pad ids at the end: transformers' classifiers look for the last token that is not pad.

    A tokenizer without a pad token pads with eos, which is then dropped as well.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    end = len(ids)
    while end > 1 and ids[end - 1] == pad:
        end -= 1
    return ids[:end]


def _sorted_labels(labels: set[str]) -> tuple[str, ...]:
    is_numeric = all(label.removeprefix("-").isdecimal() for label in labels)
    if is_numeric:  # "1" and "01" are two names of one number: the name decides, not the order of a set
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def _some(names: Sequence[str], limit: int = 12) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
