"""Prove on a sample of rows that the tokens trained on are those of the text, and the supervised ones the answers'."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any

from automodel.data.chat.encode import Tokens, leading_ids
from automodel.data.formats.samples import Messages, PromptCompletion
from automodel.data.prepare.options import Supervise
from automodel.data.prepare.prepared import Proof
from automodel.data.prepare.tokenize import tokenize_sample
from automodel.data.rows import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROVED_ROWS = 16
_SHOWN_CHARACTERS = 60


def prove(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[tuple[str, Any]],
    *,
    supervise: Supervise,
) -> Proof:
    """Tokenise rows, each with its place, and compare with the tokenizer's own ids and with the decoded answers."""
    num_rows, differences = 0, []
    for place, sample in rows:
        if not isinstance(sample, PromptCompletion | Messages):  # another kind of row has no part that is supervised
            continue
        try:
            tokens = tokenize_sample(tokenizer, sample, supervise=supervise)
        except BadRow:
            continue
        num_rows += 1
        difference = difference_of(tokenizer, tokens, is_conversation=isinstance(sample, Messages))
        if difference is not None:
            differences.append(f"{place}: {difference}")
    return Proof(num_rows, differences)


def difference_of(tokenizer: PreTrainedTokenizerBase, tokens: Tokens, *, is_conversation: bool) -> str | None:
    """Say how tokens differ from those of their text, or the supervised ones from what is supervised of it."""

    def ids_of(text: str) -> list[int]:
        as_text = not is_conversation or bool(tokens.quoted)
        return tokenizer(text, add_special_tokens=False, split_special_tokens=as_text, verbose=False)["input_ids"]

    if not tokens.quoted:
        whole = ids_of(tokens.text)
        given = tokens.ids if is_conversation else tokens.ids[len(leading_ids(tokenizer)) : -1]
        if given != whole:
            at = next((i for i, pair in enumerate(zip(given, whole, strict=False)) if pair[0] != pair[1]), len(whole))
            return f"its tokens differ from those of the whole text, first at token {at}"
    flagged = zip(tokens.ids, tokens.weights, strict=True)
    runs = [
        [token for token, _ in group]
        for is_supervised, group in groupby(flagged, key=lambda pair: pair[1] > 0)
        if is_supervised
    ]
    written = "".join(_squeezed(tokenizer, run) for run in runs)
    at = 0
    for start, end in tokens.spans:
        wanted = _squeezed(tokenizer, ids_of(tokens.text[start:end]))
        found = written.find(wanted, at)
        if found < 0:
            shown = [each[:_SHOWN_CHARACTERS] for each in (written[at:], wanted)]
            return f"its supervised tokens read {shown[0]!r}, which is not {shown[1]!r}"
        at = found + len(wanted)
    return None


def _squeezed(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return the text of ``ids`` without white space, which decoders of word marks add and drop at the borders."""
    return "".join(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False).split())
