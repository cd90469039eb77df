"""From text to token ids with the characters that each token holds."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from automodel.data.rows import BadRow
from automodel.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Noncharacters, which Unicode keeps for a program's own use: no row holds them. They bracket a special token's text in
# a user's message, so it differs from the tokens that the template writes, or they bracket a token's stand-in.
QUOTE_OPEN, QUOTE_CLOSE = "\ufdd0", "\ufdd1"


class Tokens(NamedTuple):
    """Token ids of a row and what is supervised of them.

    Attributes:
        weights: a loss weight for each token; 0.0 where it is not supervised.
        num_prompt: how many tokens come before the last supervised turn.
        ends: the indices of the supervised tokens that end a turn (the template's mark, or eos).
        end_texts: the ends that are spelt in several tokens, or in one that can occur within an answer.
        notes: what the user should know about this row; the rows are counted by it.
        text: what was tokenised, without what the tokenizer itself puts around a text.
        spans: the characters of ``text`` that are supervised.
        quoted: the places where it looks like a special token, but is a user's text.
    """

    ids: list[int]
    weights: list[float]
    num_prompt: int
    ends: tuple[int, ...] = ()
    end_texts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    quoted: tuple[tuple[int, int], ...] = ()

    @property
    def end(self) -> int | None:
        """The last of ``ends``; None without one."""
        return self.ends[-1] if self.ends else None


class Encoded(NamedTuple):
    """Token ids of a text; token ``i`` holds its characters ``starts[i]`` to ``ends[i]``, both never decreasing."""

    ids: list[int]
    starts: list[int]
    ends: list[int]

    def tokens_of(self, start: int, end: int) -> tuple[int, int]:
        """Return the range of the tokens that hold any of the characters ``start`` to ``end``."""
        first = bisect_right(self.ends, start)
        while first and self.starts[first - 1] == start:  # a token of no character, such as a lone word mark
            first -= 1
        return first, max(first, bisect_left(self.starts, end))


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    as_text: bool = False,
    quoted: Sequence[tuple[int, int]] = (),
    borders: Sequence[int] = (),
) -> Encoded:
    """Tokenise ``text`` in one piece, as the tokenizer does by itself, and say which characters each token holds.

    Args:
        as_text: what looks like a special token is text everywhere.
        quoted: the ranges, in order, where it is text although elsewhere it is not.
        borders: the positions that `Encoded.tokens_of` is asked for; only a tokenizer that reports no offsets needs
            them.

    Raises:
        BadRow: the tokenizer reports no offsets, and a token of it spans a border, or ``quoted`` is given.
    """
    if not tokenizer.is_fast:
        return _encode_without_offsets(tokenizer, text, as_text=as_text, quoted=quoted, borders=borders)
    if quoted:
        ids, offsets = _encode_quoted(tokenizer, text, quoted)
    else:
        out = _call(tokenizer, text, as_text=as_text, return_offsets_mapping=True)
        ids, offsets = out["input_ids"], out["offset_mapping"]
    added = added_ids(tokenizer)
    starts, ends = [], []
    start = end = 0
    for token, (first, last) in zip(ids, offsets, strict=True):
        # Some tokenizers leave out the white space before a word: what no token reports belongs to the next one.
        start, end = first if start <= first <= end else end, max(end, last)
        held = text[start:end]
        # An added token may swallow the white space around it, which does not change where it stands.
        is_padded = token in added and held.strip()
        starts.append(start + len(held) - len(held.lstrip()) if is_padded else start)
        ends.append(end - len(held) + len(held.rstrip()) if is_padded else end)
    return Encoded(ids, starts, ends)


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a user's text; what looks like a special token in it stays text."""
    return _call(tokenizer, text, as_text=True)["input_ids"]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens without a text of their own: bos, eos, ends of turns..."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def added_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of tokens that were added to the vocabulary: special ones, and others that are never split."""
    return _added_ids(tokenizer, len(tokenizer))


@lru_cache(maxsize=4)
def _added_ids(tokenizer: PreTrainedTokenizerBase, _: int) -> frozenset[int]:
    return frozenset(tokenizer.added_tokens_decoder)


def leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer itself puts before a text: its bos token, or nothing."""
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return [i for i in ids[:1] if i == tokenizer.bos_token_id]


def require_eos(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that ends an answer.

    Raises:
        UserError: the tokenizer has none, so that the model could never learn to stop.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no eos token, so the model could not learn to end an "
            "answer; name one of its tokens as eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def _call(tokenizer: PreTrainedTokenizerBase, text: str, *, as_text: bool, **options: Any) -> Any:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=as_text, verbose=False, **options)


def _encode_without_offsets(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    as_text: bool,
    quoted: Sequence[tuple[int, int]],
    borders: Sequence[int],
) -> Encoded:
    """Find the borders by tokenising what comes before each of them: that must give the beginning of the whole."""
    if quoted:
        spelt = text[slice(*quoted[0])]
        raise BadRow(f"holds the special token {spelt!r} as text, which this tokenizer (no fast one) cannot keep apart")
    ids = _call(tokenizer, text, as_text=as_text)["input_ids"]
    starts, ends = [0] * len(ids), [len(text)] * len(ids)
    for border in sorted(set(borders)):
        before = _call(tokenizer, text[:border], as_text=as_text)["input_ids"]
        if ids[: len(before)] != before:
            raise BadRow(
                f"the tokenizer reports no offsets, and a token spans the border before {text[border : border + 20]!r}"
            )
        starts[len(before) :] = [border] * (len(ids) - len(before))
        ends[: len(before)] = [min(end, border) for end in ends[: len(before)]]
    return Encoded(ids, starts, ends)


def _encode_quoted(
    tokenizer: PreTrainedTokenizerBase, text: str, quoted: Sequence[tuple[int, int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokenise with stand-ins for the special tokens outside ``quoted``, which split the text just as those do."""
    backend, ids_of, names = _with_stand_ins(tokenizer, len(tokenizer))
    special = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    pieces: list[str] = []
    places: list[tuple[int, int]] = []  # where a piece begins: with stand-ins, and in the text

    def add(piece: str, at: int) -> None:
        places.append((places[-1][0] + len(pieces[-1]) if pieces else 0, at))
        pieces.append(piece)

    position = 0
    for start, end in [*quoted, (len(text), len(text))]:
        for found in special.finditer(text, position, start):
            add(text[position : found.start()], position)
            add(names[found.group()], found.start())
            position = found.end()
        add(text[position:end], position)
        position = end
    begins = [place for place, _ in places]

    def in_text(place: int, *, is_end: bool) -> int:
        index = (bisect_left if is_end and place else bisect_right)(begins, place) - 1
        begin, at = places[index]
        following = places[index + 1][1] if index + 1 < len(places) else len(text)
        if place > begin and pieces[index].startswith(QUOTE_OPEN):
            return following
        return min(at + place - begin, following)

    found = backend.encode("".join(pieces), add_special_tokens=False)
    ids = [ids_of.get(token, token) for token in found.ids]
    return ids, [(in_text(start, is_end=False), in_text(end, is_end=True)) for start, end in found.offsets]


@lru_cache(maxsize=4)
def _with_stand_ins(tokenizer: PreTrainedTokenizerBase, _: int) -> tuple[Any, dict[int, int], dict[str, str]]:
    """Return a copy of the backend that reads special tokens as text, and each one's stand-in, which it splits at."""
    from tokenizers import AddedToken, Tokenizer

    specials = {
        i: token for i, token in tokenizer.added_tokens_decoder.items() if token.content in special_tokens(tokenizer)
    }
    names = {
        token.content: f"{QUOTE_OPEN}{chr(0xF0000 + index)}{QUOTE_CLOSE}"
        for index, token in enumerate(specials.values())
    }
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    for token in specials.values():
        flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word", "normalized")}
        backend.add_tokens([AddedToken(names[token.content], special=False, **flags)])
    ids_of = {backend.token_to_id(names[token.content]): i for i, token in specials.items()}
    return backend, ids_of, names
