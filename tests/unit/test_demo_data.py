"""The embedded instruction rows and the character tokenizer that reads them."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from automodel.data import demo
from automodel.data.demo import DEMO_KINDS, generate_demo_rows
from automodel.models import char_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")


def expected_answer(prompt: str) -> str:
    """Answer a question from its text alone, by other means than the generator's."""
    name, text = re.fullmatch(r"(\w+): (.+)\n", prompt).groups()
    if name == "Add":
        left, right = re.fullmatch(r"(\d+)\+(\d+)", text).groups()
        return f"{int(left) + int(right)}"
    if name == "Larger":
        left, right = re.fullmatch(r"(\d+) (\d+)", text).groups()
        return left if int(left) >= int(right) else right
    assert re.fullmatch(r"[a-z]{3,6}", text)
    if name == "Reverse":
        return "".join(reversed(text))
    if name == "Upper":
        return "".join(string.ascii_uppercase[string.ascii_lowercase.index(c)] for c in text)
    if name == "Sort":
        counts = Counter(text)
        return "".join(letter * counts[letter] for letter in string.ascii_lowercase)
    assert name == "Last"
    return text[-1:]


def subject(row: dict[str, str]) -> object:
    """What a question is about: its word, or its pair of numbers in either order."""
    text = row["prompt"].split(": ")[1].strip()
    numbers = re.findall(r"\d+", text)
    return frozenset(numbers) if numbers else text


def digest(rows: list[dict[str, str]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


@pytest.fixture(scope="module")
def train_rows() -> list[dict[str, str]]:
    return generate_demo_rows("train")


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer.build_char_tokenizer()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_answer_is_right_and_labelled_with_its_kind(split: str) -> None:
    for row in generate_demo_rows(split, num_rows=3000, seed=5):
        assert set(row) == {"prompt", "completion", "kind"}
        assert row["completion"] == expected_answer(row["prompt"])
        assert row["prompt"].lower().startswith(row["kind"] + ": ")


def test_kinds_include_addition_and_reversal() -> None:
    assert len(set(DEMO_KINDS)) == len(DEMO_KINDS) >= 5
    assert {"add", "reverse"} <= set(DEMO_KINDS)


def test_additions_cover_one_and_two_digit_numbers(train_rows: list[dict[str, str]]) -> None:
    sums = [row["completion"] for row in train_rows if row["kind"] == "add"]
    assert {len(total) for total in sums} == {1, 2, 3}
    assert max(map(int, sums)) > 190


def test_defaults_give_thousands_to_train_on_and_every_kind_held_out(
    train_rows: list[dict[str, str]],
) -> None:
    assert len(train_rows) >= 5000
    held_out = Counter(row["kind"] for row in generate_demo_rows("validation"))
    assert held_out == dict.fromkeys(DEMO_KINDS, 60)


@pytest.mark.parametrize("prefix", [6, 100, 1001])
def test_every_prefix_is_balanced(train_rows: list[dict[str, str]], prefix: int) -> None:
    counts = Counter(row["kind"] for row in train_rows[:prefix])
    assert set(counts) == set(DEMO_KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_held_out_subject_is_ever_trained_on(train_rows: list[dict[str, str]], seed: int) -> None:
    trained = {subject(row) for row in train_rows}
    held_out = {subject(row) for row in generate_demo_rows("validation", num_rows=3000, seed=seed)}
    assert len(held_out) > 1000
    assert trained.isdisjoint(held_out)


def test_questions_do_not_repeat(train_rows: list[dict[str, str]]) -> None:
    assert len({row["prompt"] for row in train_rows}) == len(train_rows)


def test_fewer_rows_are_a_prefix_of_more(train_rows: list[dict[str, str]]) -> None:
    assert generate_demo_rows("train", num_rows=50) == train_rows[:50]
    assert generate_demo_rows("train", num_rows=0) == []


def test_another_seed_gives_other_rows() -> None:
    assert generate_demo_rows("train", num_rows=60, seed=0) != generate_demo_rows("train", num_rows=60, seed=1)


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    random.seed(1)
    state = random.getstate()
    first = generate_demo_rows("train", num_rows=60)
    assert random.getstate() == state
    random.seed(2)
    assert generate_demo_rows("train", num_rows=60) == first


@pytest.mark.parametrize("hash_seed", ["1", "4242"])
def test_rows_are_the_same_in_another_process(hash_seed: str) -> None:
    script = (
        "import hashlib, json, sys\n"
        "from automodel.data.demo import generate_demo_rows\n"
        "import automodel.models.char_tokenizer\n"
        "rows = generate_demo_rows('train', num_rows=600, seed=3)\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.stdout.write(hashlib.sha256(json.dumps(rows).encode()).hexdigest())\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == digest(generate_demo_rows("train", num_rows=600, seed=3))


def test_a_pair_of_numbers_has_one_split_in_either_order() -> None:
    for row in generate_demo_rows("validation", num_rows=600):
        if row["kind"] == "add":
            first, second = sorted(map(int, re.findall(r"\d+", row["prompt"])))
            assert demo.is_held_out(f"{first},{second}")


@pytest.mark.parametrize("split", ["test", "", "Train"])
def test_unknown_split_is_refused(split: str) -> None:
    with pytest.raises(ValueError, match="unknown split"):
        generate_demo_rows(split)


def test_impossible_numbers_of_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        generate_demo_rows("train", num_rows=-1)
    with pytest.raises(ValueError, match="ask for fewer rows"):
        generate_demo_rows("validation", num_rows=20_000)


def test_every_character_is_one_token_with_its_own_id(tokenizer) -> None:
    ids = [tokenizer(c, add_special_tokens=False).input_ids for c in PRINTABLE]
    assert all(len(one) == 1 for one in ids)
    specials = [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS]
    assert len({one[0] for one in ids} | set(specials)) == len(PRINTABLE) + 4 == len(tokenizer)
    assert specials == [
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.unk_token_id,
    ]


def test_only_the_beginning_token_is_added(tokenizer) -> None:
    bare = tokenizer("ab\n", add_special_tokens=False).input_ids
    assert len(bare) == 3
    assert tokenizer("ab\n").input_ids == [tokenizer.bos_token_id, *bare]
    assert tokenizer("é", add_special_tokens=False).input_ids == [tokenizer.unk_token_id]


ROUND_TRIP_TEXTS = [
    PRINTABLE,
    "  two  spaces,   three \n\n and . a ' comma , n't !  ",
    " ",
    "    ",
    "\n\n\n",
    "##x _ ~`\\",
    "Add: 12+34\n46",
]


@pytest.mark.parametrize("reloaded", [False, True])
def test_text_round_trips_exactly(tokenizer, tmp_path: Path, reloaded: bool) -> None:
    if reloaded:
        from transformers import AutoTokenizer

        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(0)
    noise = ["".join(rng.choices(PRINTABLE, k=80)) for _ in range(100)]
    for text in ROUND_TRIP_TEXTS + noise:
        bare = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(bare) == text
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_saving_keeps_everything(tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded.get_vocab() == tokenizer.get_vocab()
    assert reloaded.chat_template == tokenizer.chat_template
    assert reloaded.model_max_length == tokenizer.model_max_length
    assert reloaded.clean_up_tokenization_spaces is False
    assert reloaded("Add: 1+2\n").input_ids == tokenizer("Add: 1+2\n").input_ids
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(reloaded, name) == getattr(tokenizer, name)


def test_demo_rows_need_no_unknown_token(tokenizer) -> None:
    for row in generate_demo_rows("train", num_rows=120):
        text = row["prompt"] + row["completion"]
        ids = tokenizer(text, add_special_tokens=False).input_ids
        # Prompt and answer can be tokenized apart: no token spans their border.
        apart = [
            *tokenizer(row["prompt"], add_special_tokens=False).input_ids,
            *tokenizer(row["completion"], add_special_tokens=False).input_ids,
        ]
        assert ids == apart
        assert tokenizer.unk_token_id not in ids


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add: 1+2"},
    {"role": "assistant", "content": "3"},
]


def test_chat_template_frames_the_turns(tokenizer) -> None:
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    asked = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert whole.startswith(asked + "3" + tokenizer.eos_token)
    assert asked.startswith(tokenizer.bos_token)
    assert "Be brief." in asked
    assert "Add: 1+2" in asked


def test_chat_template_marks_the_answer_and_its_end(tokenizer) -> None:
    encoded = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    marked = [token for token, answer in zip(ids, mask, strict=True) if answer]
    assert tokenizer.decode(marked) == "3" + tokenizer.eos_token
    assert ids.count(tokenizer.bos_token_id) == 1
