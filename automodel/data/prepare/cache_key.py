"""Everything that decides the prepared rows of a source: the key of their folder in the cache."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel.data.prepare.cache import canonical
from automodel.data.prepare.options import PrepareOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from automodel.data.formats.row_format import RowReader
    from automodel.data.sources import Source

_PREPARED_AS = 4
"""Raised when what is written to the cache changes, so that older folders are not taken for it."""


def rows_key(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    options: PrepareOptions,
    *,
    task: Any,
    reader: RowReader | None,
    keeps_prompts: bool,
) -> dict[str, Any]:
    """Return all that decides the prepared rows, as facts for ``build_once``.

    The tokenizer must still have its own chat template: the options say which one renders the rows.
    """
    template = tokenizer.chat_template
    if options.chat_template is not None and Path(options.chat_template).is_file():
        template = Path(options.chat_template).read_text(encoding="utf-8", errors="replace")
    return {
        "prepared as": _PREPARED_AS,
        "rows": source.identity(),
        "options": options.deciding_tokens() | {"on_bad_row": options.on_bad_row},
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": template,
        "format": None if reader is None else _code_of(type(reader.format)),
        "task": [_code_of(type(task)), task.identity()],
        "prompts": keeps_prompts,
    }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the vocabulary, the rules and the special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inner = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    facts = [
        type(tokenizer).__name__,
        inner,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]
    return hashlib.sha256(canonical(facts)).hexdigest()[:16]


def _code_of(cls: type) -> list[str]:
    """Return the name of a class, and a hash of its file unless ``_PREPARED_AS`` covers its code."""
    named = [cls.__module__, cls.__qualname__]
    if cls.__module__.startswith("automodel."):
        return named
    try:
        return [*named, hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()[:16]]
    except (OSError, TypeError):  # defined in a notebook, say
        return named
