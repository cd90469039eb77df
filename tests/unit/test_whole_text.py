"""A conversation is tokenised as one text: the ids are those of the tokenizer itself, and spans follow characters."""

import json

import pytest

from automodel.data.chat.conversation import JOINED, tokenize_messages
from automodel.data.chat.encode import encode
from automodel.data.formats.samples import Messages, PromptCompletion
from automodel.data.prepare.tokenize import tokenize_completion
from automodel.data.rows import BadRow
from tests.unit.test_supervision import FRAMES, PAIRS, choose, conversation, written
from tests.unit.tiny_tokenizers import KINDS, build


@pytest.fixture(scope="module")
def tokenizers(shared_data, stories):
    from transformers import AutoTokenizer, GPT2Tokenizer

    folder = shared_data / "templates"
    return {
        "stories": AutoTokenizer.from_pretrained(stories),
        "minimind": AutoTokenizer.from_pretrained(folder / "tok_minimind"),
        "gpt2": GPT2Tokenizer(str(folder / "tok_gpt2" / "vocab.json"), str(folder / "tok_gpt2" / "merges.txt")),
        **{kind: build(kind) for kind in KINDS},
    }


NAMES = ("stories", "minimind", "gpt2", *KINDS)


@pytest.fixture(params=NAMES)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


def squeezed(text):
    return "".join(text.split())


def supervised_text(tokenizer, tokens):
    """Return the supervised text without white space, which some of these decoders add or drop."""
    ids = [i for i, weight in zip(tokens.ids, tokens.weights, strict=True) if weight]
    return squeezed(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize("name", FRAMES)
def test_ids_are_those_of_the_whole_text(shared_data, tokenizer, name):
    choose(tokenizer, shared_data, name)
    pairs = [("Tell me.", "Once upon a time."), *PAIRS[:2]]
    turns = conversation(None, pairs)
    tokens = tokenize_messages(tokenizer, Messages(turns))
    assert tokens.ids == tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokens.ids == tokenizer(whole, add_special_tokens=False)["input_ids"]
    frame = FRAMES[name]
    if frame.opening is not None:
        answers = [text for text, is_answer in written(tokenizer, name, frame.pieces(None, pairs)) if is_answer]
        rest = supervised_text(tokenizer, tokens)
        for answer in map(squeezed, answers):  # a token over a border brings a character or two of the other side
            before, found, rest = rest.partition(answer)
            assert found and len(before) <= 2
        assert len(rest) <= 2


def test_case_of_the_border_has_no_space_that_the_text_has_not(shared_data, tokenizer):
    choose(tokenizer, shared_data, "chatml")
    lines = (shared_data / "cases" / "sentencepiece-border" / "rows.jsonl").read_text().splitlines()
    for line in lines:
        turns = json.loads(line)["messages"]
        tokens = tokenize_messages(tokenizer, Messages(turns))
        whole = tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(tokens.ids) == tokenizer.convert_ids_to_tokens(whole)
        assert whole[: tokens.num_prompt] == tokens.ids[: tokens.num_prompt]


@pytest.mark.parametrize("text", ["</s>", "<|im_start|>", "<s>x</s> y", " </s> "])
def test_special_token_in_a_message_stays_text_and_the_rest_is_split_as_before(tokenizers, text):
    for kind in KINDS:
        tokenizer = tokenizers[kind]
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
        )
        turns = conversation(None, [(f"Tell{text}me.", f"Once {text}."), ("Two?", "2.")])
        tokens = tokenize_messages(tokenizer, Messages(turns))
        names = tokenizer.convert_ids_to_tokens(tokens.ids)
        assert names.count("</s>") == names.count("<s>") == 0
        assert names.count("<|im_start|>") == names.count("<|im_end|>") == 4
        assert squeezed(f"Once{text}.") in supervised_text(tokenizer, tokens)
        # Turn for turn as in a conversation whose message holds the text, spelt with tokens that are no special ones.
        last = len(names) - 1 - names[::-1].index("<|im_start|>")
        plain = tokenize_messages(tokenizer, Messages(conversation(None, [("Tell me.", "Once."), ("Two?", "2.")])))
        tail = tokenizer.convert_ids_to_tokens(plain.ids)
        assert names[last:] == tail[len(tail) - 1 - tail[::-1].index("<|im_start|>") :]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("Tell me.", " Once upon."), ("Tell me.\n", "Once upon a time."), ("Tell me a st", "ory about"), ("", "One")],
)
def test_prompt_and_completion_are_one_text(tokenizer, prompt, completion):
    tokens = tokenize_completion(tokenizer, PromptCompletion(prompt, completion))
    whole = tokenizer(prompt + completion, add_special_tokens=True)["input_ids"]
    assert tokens.ids == [*whole, tokenizer.eos_token_id]
    assert squeezed(completion) in supervised_text(tokenizer, tokens)
    before = tokenizer.decode(tokens.ids[: tokens.num_prompt], skip_special_tokens=True)
    assert squeezed(prompt).startswith(squeezed(before))


def test_token_over_the_border_is_written_by_the_model_and_counted(tokenizers):
    tokenizer = tokenizers["gpt2"]
    tokens = tokenize_completion(tokenizer, PromptCompletion("He said: o", "nce upon"))
    assert tokenizer.convert_ids_to_tokens(tokens.ids[tokens.num_prompt :]) == ["Ġonce", "Ġupon", "<|endoftext|>"]
    assert tokens.notes == (JOINED,)
    assert tokenize_completion(tokenizer, PromptCompletion("He said:", " once")).notes == ()


def test_characters_of_several_tokens_belong_to_their_side(tokenizers):
    tokenizer = tokenizers["gpt2"]
    prompt, completion = "\u00e9\u4e2d", "\u4e2d\U0001f600"
    tokens = tokenize_completion(tokenizer, PromptCompletion(prompt, completion))
    assert tokenizer.decode(tokens.ids[: tokens.num_prompt]) == prompt
    assert tokenizer.decode(tokens.ids[tokens.num_prompt : -1]) == completion


def test_white_space_that_a_special_token_swallows_changes_no_side(tokenizers):
    tokenizer = tokenizers["swallowing"]
    text = "<|user|>\nTell me.\n<|assistant|>\n Once.\n<|im_end|>\n<|user|>"
    start, end = text.index("\n Once"), text.index("\n<|user|>", 5)
    first, stop = encode(tokenizer, text).tokens_of(start, end)
    held = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])[first:stop]
    assert "<|assistant|>" not in held and "<|user|>" not in held
    assert held[-1] == "<|im_end|>"
    assert "".join(held[:-1]).replace("▁", "") == "Once."


def test_tokenizer_without_offsets_gives_the_same_or_refuses():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    tokens = tokenize_completion(tokenizer, PromptCompletion("ab", "cd\u00e9"))
    assert tokens.ids == tokenizer("abcd\u00e9")["input_ids"]
    assert tokenizer.decode(tokens.ids[tokens.num_prompt :]) == "cd\u00e9</s>"
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokens = tokenize_messages(tokenizer, Messages(conversation(None, [("One?", "1.")])))
    assert tokens.ids == tokenizer("One?</s>1.</s>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens.ids[tokens.num_prompt :]) == "1.</s>"
    with pytest.raises(BadRow, match=r"holds the special token '</s>' as text, which this tokenizer"):
        tokenize_messages(tokenizer, Messages(conversation(None, [("One?</s>", "1.")])))
