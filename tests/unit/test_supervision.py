"""For every chat template: exactly the answers and their ends are supervised, compared with texts written by hand."""

import datetime
from itertools import groupby

import pytest

from automodel.data.chat.conversation import tokenize_messages
from automodel.data.chat.templates import BUILT_IN_TEMPLATES, set_chat_template
from automodel.data.formats.samples import Messages
from automodel.data.rows import BadRow
from automodel.models.char_tokenizer import build_char_tokenizer

QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
TODAY = datetime.datetime.now().strftime("%d %b %Y")
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"

PAIRS = [("One?", "1."), ("Two?", "2.\n\nTwo."), ("A fish?", "I said:\n 1.")]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}]
TOOL_TURNS = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "abcdefghi", "name": "add"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Bye."},
]


class Frame:
    """A template's texts around the contents; {B} and {E} are bos and eos.

    ``system`` None: the template knows none. Lead: what of an answer's beginning the template writes itself.
    """

    def __init__(self, user, header, end, *, system, opening="", gap="", last_gap=None, lead="", last_lead=None):
        self.user, self.header, self.end, self.gap, self.lead = user, header, end, gap, lead
        self.system, self.opening = system, opening
        self.last_gap = gap if last_gap is None else last_gap
        self.last_lead = lead if last_lead is None else last_lead

    def pieces(self, system, pairs):
        """Return the texts of a conversation, each with whether it is supervised."""
        said = [(self.system.replace("{S}", system).replace("{Q}", pairs[0][0]) if system else self.opening, False)]
        for number, (question, answer) in enumerate(pairs, start=1):
            is_last = number == len(pairs)
            if not (number == 1 and system and "{Q}" in self.system):  # there the system opens the first question
                said.append((self.user.replace("{Q}", question) + self.header, False))
            said.append(((self.last_lead if is_last else self.lead) + answer + self.end, True))
            said.append((self.last_gap if is_last else self.gap, False))
        return said


def llama3_frame(**opening):
    return Frame(
        "<|start_header_id|>user<|end_header_id|>\n\n{Q}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
        **opening,
    )


LLAMA3_SYSTEM = "{B}<|start_header_id|>system<|end_header_id|>\n\n{S}<|eot_id|>"
DATED = f"Cutting Knowledge Date: December 2023\nToday Date: {TODAY}\n\n"


def chatml_frame(**changes):
    system = "<|im_start|>system\n{S}<|im_end|>\n"
    usual = {"system": system, "gap": "\n"}
    user, header = "<|im_start|>user\n{Q}<|im_end|>\n", "<|im_start|>assistant\n"
    return Frame(user, header, "<|im_end|>", **(usual | changes))


GEMMA = ("<start_of_turn>user\n{Q}<end_of_turn>\n", "<start_of_turn>model\n", "<end_of_turn>")
FRAMES = {
    "trl_llama3": llama3_frame(opening="{B}", system=LLAMA3_SYSTEM),
    "trl_llama3_training": llama3_frame(opening="{B}", system=LLAMA3_SYSTEM),
    "trl_llama3_2": llama3_frame(
        opening=LLAMA3_SYSTEM.replace("{S}", DATED), system=LLAMA3_SYSTEM.replace("{S}", DATED + "{S}")
    ),
    "trl_qwen2_5": chatml_frame(opening=f"<|im_start|>system\n{QWEN_SYSTEM}<|im_end|>\n"),
    "trl_qwen3": chatml_frame(last_lead=EMPTY_THOUGHT),
    "trl_qwen3_training": chatml_frame(lead=EMPTY_THOUGHT),
    "trl_gemma": Frame(*GEMMA, system=None, opening="{B}", gap="\n"),
    "axolotl_chatml": chatml_frame(),
    "axolotl_mistral_v3_tekken": Frame("[INST]{Q}[/INST]", "", "{E}", system=None, opening="{B}"),
    "axolotl_phi_4": Frame(
        "<|im_start|>user<|im_sep|>{Q}<|im_end|>",
        "<|im_start|>assistant<|im_sep|>",
        "<|im_end|>",
        system="<|im_start|>system<|im_sep|>{S}<|im_end|>",
        opening=None,  # a page of instructions
    ),
    "axolotl_alpaca": Frame(
        "### Instruction:\n{Q}\n\n",
        "### Response:\n",
        "{E}",
        opening="{B}",
        system="{B}{S}\n\n",
        gap="\n\n",
        last_gap="",
    ),
    # The white space that these files leave in is theirs. What follows the generation prompt is supervised.
    "cz_llama-2-chat": Frame(
        "\n\n        {B}[INST] {Q} [/INST]\n",
        "",
        " {E}",
        opening="\n",
        gap="\n",
        lead="\n\n         ",
        system="\n\n\n        {B}[INST] <<SYS>>\n{S}\n<</SYS>>\n\n{Q} [/INST]\n",
    ),
    "cz_vicuna": Frame(
        "\n        USER: {Q}\n\n\n",
        "        ASSISTANT:",
        "{E}",
        opening="\n{B}\n",
        system="\n{B}{S}\n\n\n",
        lead=" ",
        gap="\n\n",
        last_gap="\n\n\n",
    ),
    "cz_zephyr": Frame(
        "\n    <|user|>\n{Q}{E}\n\n\n",
        "    <|assistant|>\n",
        "{E}",
        opening="\n",
        system="\n\n    <|system|>\n{S}{E}\n\n",
        gap="\n\n",
        last_gap="\n\n\n",
    ),
    "chatml": chatml_frame(),
    "llama3": llama3_frame(opening="{B}", system=LLAMA3_SYSTEM),
    "gemma": Frame(
        *GEMMA,
        system="{B}<start_of_turn>user\n{S}\n\n{Q}<end_of_turn>\n<start_of_turn>model\n",
        opening="{B}",
        gap="\n",
    ),
    "alpaca": Frame(
        "### Instruction:\n{Q}\n\n", "### Response:\n", "{E}", opening="{B}" + ALPACA, system="{B}{S}\n\n", gap="\n\n"
    ),
}

QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call><|im_end|>'
QWEN_ANSWERS = [QWEN_CALL, "It is 3.<|im_end|>", "Bye.<|im_end|>"]
TOOL_ANSWERS = {
    "chatml": QWEN_ANSWERS,
    "trl_qwen2_5": QWEN_ANSWERS,
    "trl_qwen3": [*QWEN_ANSWERS[:2], EMPTY_THOUGHT + QWEN_ANSWERS[2]],
    "trl_qwen3_training": [EMPTY_THOUGHT + answer for answer in QWEN_ANSWERS],
    "trl_llama3_2": [
        '{"name": "add", "parameters": {"a": 1, "b": [2]}}<|eot_id|>',
        "It is 3.<|eot_id|>",
        "Bye.<|eot_id|>",
    ],
    "axolotl_mistral_v3_tekken": [
        '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1, "b": [2]}, "id": "abcdefghi"}]{E}',
        "It is 3.{E}",
        "Bye.{E}",
    ],
}


@pytest.fixture(scope="module")
def tokenizers(shared_data):
    from transformers import AutoTokenizer, GPT2Tokenizer

    folder = shared_data / "templates"
    gpt2 = GPT2Tokenizer(str(folder / "tok_gpt2" / "vocab.json"), str(folder / "tok_gpt2" / "merges.txt"))
    assert gpt2.eos_token == gpt2.bos_token == "<|endoftext|>"
    gpt2.pad_token = gpt2.eos_token
    return {"minimind": AutoTokenizer.from_pretrained(folder / "tok_minimind"), "gpt2": gpt2}


@pytest.fixture(params=["minimind", "gpt2"])
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


@pytest.fixture
def minimind(shared_data):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "templates" / "tok_minimind")


def choose(tokenizer, shared_data, name):
    file = shared_data / "templates" / f"{name}.jinja"
    set_chat_template(tokenizer, name if name in BUILT_IN_TEMPLATES else str(file))


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def runs(tokenizer, tokens):
    """Return the text of each run of tokens that are, or are not, supervised."""
    both = zip(tokens.ids, tokens.weights, strict=True)
    grouped = groupby(both, key=lambda pair: pair[1] > 0)
    return [(decode(tokenizer, [i for i, _ in group]), is_supervised) for is_supervised, group in grouped]


def by_characters(tokenizer, ids, pieces):
    """Return for each token whether it holds a character of a piece that is supervised, from its text alone."""
    flags = [is_supervised for text, is_supervised in pieces for _ in text]
    found, at = [], 0
    for i in ids:
        length = len(decode(tokenizer, [i]))
        found.append(any(flags[at : at + length]))
        at += length
    assert at == len(flags)
    return found


def supervised(tokenizer, tokens):
    return [text for text, is_supervised in runs(tokenizer, tokens) if is_supervised]


def conversation(system, pairs):
    turns = [{"role": "system", "content": system}] if system else []
    for question, answer in pairs:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return turns


def written(tokenizer, name, pieces):
    """Join neighbours that are supervised alike, with the tokenizer's own special tokens."""
    vocabulary = tokenizer.get_vocab()
    ends = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>") if name in BUILT_IN_TEMPLATES else ()
    texts = []
    for text, is_supervised in pieces:
        text = text.replace("{B}", tokenizer.bos_token).replace("{E}", tokenizer.eos_token)
        for end in ends:  # a built-in template ends turns with a token that the tokenizer has
            text = text if end in vocabulary else text.replace(end, tokenizer.eos_token)
        texts.append((text, is_supervised))
    grouped = groupby((piece for piece in texts if piece[0]), key=lambda piece: piece[1])
    return [("".join(text for text, _ in group), is_supervised) for is_supervised, group in grouped]


def test_every_template_has_a_frame(shared_data):
    assert set(FRAMES) == {file.stem for file in (shared_data / "templates").glob("*.jinja")} | set(BUILT_IN_TEMPLATES)


@pytest.mark.parametrize("num_pairs", [1, 3])
@pytest.mark.parametrize("name", FRAMES)
def test_answers_and_their_ends_alone_are_supervised(shared_data, tokenizer, name, num_pairs):
    choose(tokenizer, shared_data, name)
    turns = conversation(None, PAIRS[:num_pairs])
    tokens = tokenize_messages(tokenizer, Messages(turns))
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert decode(tokenizer, tokens.ids) == whole
    frame = FRAMES[name]
    if frame.opening is None:
        opening = whole[: whole.index("<|im_start|>user")]
        frame = Frame(frame.user, frame.header, frame.end, system=None, opening=opening)
    pieces = written(tokenizer, name, frame.pieces(None, PAIRS[:num_pairs]))
    assert whole == "".join(text for text, _ in pieces)
    assert [weight > 0 for weight in tokens.weights] == by_characters(tokenizer, tokens.ids, pieces)
    assert tokens.end == max(index for index, weight in enumerate(tokens.weights) if weight)


@pytest.mark.parametrize("name", FRAMES)
def test_system_is_never_supervised(shared_data, tokenizer, name):
    choose(tokenizer, shared_data, name)
    row = Messages(conversation("Be brief.", PAIRS))
    if FRAMES[name].system is None:
        with pytest.raises(BadRow, match=r"System role not supported|leaves out message 1 \(role system\)"):
            tokenize_messages(tokenizer, row)
        return
    tokens = tokenize_messages(tokenizer, row)
    pieces = written(tokenizer, name, FRAMES[name].pieces("Be brief.", PAIRS))
    assert decode(tokenizer, tokens.ids) == "".join(text for text, _ in pieces)
    assert [weight > 0 for weight in tokens.weights] == by_characters(tokenizer, tokens.ids, pieces)


@pytest.mark.parametrize("name", FRAMES)
def test_calls_of_tools_are_supervised_as_the_template_writes_them(shared_data, tokenizer, name):
    choose(tokenizer, shared_data, name)
    row = Messages(TOOL_TURNS, TOOLS)
    if name not in TOOL_ANSWERS:
        with pytest.raises(BadRow, match=r"the chat template (leaves out|cannot render)"):
            tokenize_messages(tokenizer, row)
        return
    tokens = tokenize_messages(tokenizer, row)
    rest = tokenizer.apply_chat_template(TOOL_TURNS, tools=TOOLS, tokenize=False)
    assert decode(tokenizer, tokens.ids) == rest
    pieces = []
    for answer in TOOL_ANSWERS[name]:
        ((answer, _),) = written(tokenizer, name, [(answer, True)])
        before, answer, rest = rest.partition(answer)
        pieces += [(before, False), (answer, True)]
    pieces.append((rest, False))
    assert [weight > 0 for weight in tokens.weights] == by_characters(tokenizer, tokens.ids, pieces)


@pytest.mark.parametrize("name", FRAMES)
def test_white_space_around_contents_is_as_the_template_leaves_it(shared_data, tokenizer, name):
    choose(tokenizer, shared_data, name)
    turns = conversation(None, [(" QQQ\n", " \nXYZ \n"), ("\n QQQ", "UVW\n\n")])
    tokens = tokenize_messages(tokenizer, Messages(turns))
    assert decode(tokenizer, tokens.ids) == tokenizer.apply_chat_template(turns, tokenize=False)
    first, second = supervised(tokenizer, tokens)
    assert "XYZ" in first
    assert "UVW" in second
    for other in ("QQQ", "#", "assistant", "INST", "ASSISTANT", "user", "model"):
        assert other not in first + second


def test_own_template_of_minimind_with_thought_and_call(minimind):
    thoughtful = [TOOL_TURNS[0], TOOL_TURNS[1] | {"reasoning_content": "Add."}, *TOOL_TURNS[2:]]
    tokens = tokenize_messages(minimind, Messages(thoughtful, TOOLS))
    # The header opens the thought, as its generation prompt does.
    assert supervised(minimind, tokens) == ["Add.\n</think>\n\n" + QWEN_CALL, *QWEN_ANSWERS[1:]]
    assert decode(minimind, tokens.ids[: tokens.num_prompt]).endswith("assistant\n" + EMPTY_THOUGHT)


@pytest.mark.parametrize("name", ["chatml", "trl_qwen2_5", "trl_llama3"])
def test_reasoning_that_a_template_does_not_write_is_refused(shared_data, tokenizers, name):
    choose(tokenizers["gpt2"], shared_data, name)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c d"}]
    with pytest.raises(BadRow, match=r"leaves out the thought 'c d' of message 2 \(role assistant\)"):
        tokenize_messages(tokenizers["gpt2"], Messages(turns))


def test_answers_that_repeat_the_template_or_each_other_keep_their_places(shared_data, tokenizer):
    choose(tokenizer, shared_data, "axolotl_alpaca")
    turns = conversation(None, [("1", "1"), ("1\n\n### Response:\n1", "### Response:\n1"), ("1", "1")])
    tokens = tokenize_messages(tokenizer, Messages(turns))
    eos = tokenizer.eos_token
    assert supervised(tokenizer, tokens) == [f"1{eos}", f"### Response:\n1{eos}", f"1{eos}"]


def test_last_answer_alone_is_supervised_where_asked(shared_data, tokenizer):
    choose(tokenizer, shared_data, "chatml")
    row = Messages(conversation(None, PAIRS))
    every, last = (tokenize_messages(tokenizer, row, supervise=which) for which in ("all", "last"))
    assert last.ids == every.ids
    assert (last.num_prompt, last.end) == (every.num_prompt, every.end)
    assert supervised(tokenizer, last) == supervised(tokenizer, every)[-1:]


def test_weights_of_messages_reach_their_tokens_alone(shared_data, tokenizers):
    tokenizer = tokenizers["minimind"]
    choose(tokenizer, shared_data, "chatml")
    row = Messages(conversation("S", PAIRS), weights=[None, 0.25, 0.0, None, 0.5, 0.0, None])
    tokens = tokenize_messages(tokenizer, row)
    both = zip(tokens.ids, tokens.weights, strict=True)
    grouped = [(weight, [i for i, _ in group]) for weight, group in groupby(both, key=lambda pair: pair[1])]
    weighted = [(weight, decode(tokenizer, ids)) for weight, ids in grouped if weight]
    assert weighted == [(0.25, "One?"), (0.5, "2.\n\nTwo.<|im_end|>"), (1.0, "I said:\n 1.<|im_end|>")]


def test_num_prompt_and_end_belong_to_the_last_supervised_turn(shared_data, tokenizers):
    tokenizer = tokenizers["minimind"]
    choose(tokenizer, shared_data, "chatml")
    tokens = tokenize_messages(tokenizer, Messages(conversation(None, PAIRS[:2]), weights=[None, 1.0, None, 0.0]))
    assert supervised(tokenizer, tokens) == ["1.<|im_end|>"]
    assert decode(tokenizer, tokens.ids[: tokens.num_prompt]).endswith("One?<|im_end|>\n<|im_start|>assistant\n")
    assert decode(tokenizer, tokens.ids[: tokens.end + 1]).endswith("assistant\n1.<|im_end|>")


def test_bos_of_the_template_is_not_doubled_by_the_tokenizers_own():
    tokenizer = build_char_tokenizer()
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id  # it puts one before every text
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    tokens = tokenize_messages(tokenizer, Messages(conversation(None, [("a", "b")])))
    assert tokenizer.decode(tokens.ids) == "<s>ab</s>"


def test_pad_token_that_ends_turns_is_supervised_as_an_end(shared_data, tokenizers):
    tokenizer = tokenizers["gpt2"]
    assert tokenizer.pad_token == tokenizer.eos_token
    choose(tokenizer, shared_data, "chatml")
    tokens = tokenize_messages(tokenizer, Messages(conversation(None, PAIRS)))
    is_end = [i == tokenizer.eos_token_id for i in tokens.ids]
    assert sum(is_end) == 6
    assert [weight for weight, end in zip(tokens.weights, is_end, strict=True) if end] == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "more than once"),
        ("{% for m in messages %}{{ m.content | length }}{% endfor %}", "otherwise when its contents are marked"),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]", "ends message . in a way"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", r"leaves out message 2 \(role ass"),
        ("{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}", "does not hold one"),
    ],
)
def test_spans_that_cannot_be_proved_are_refused(template, expected):
    tokenizer = build_char_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(BadRow, match=expected):
        tokenize_messages(tokenizer, Messages(conversation(None, PAIRS)))
