"""Nothing of a conversation vanishes in silence: what a template leaves out is refused by name, or counted."""

import json
import logging

import pytest

from automodel.data.chat import spans
from automodel.data.chat.conversation import RESPELT, THOUGHTS_LEFT_OUT, tokenize_messages
from automodel.data.formats.samples import Messages
from automodel.data.formats.turns import read_turns
from automodel.data.rows import BadRow
from automodel.data.sources import FileDataset
from automodel.models.char_tokenizer import build_char_tokenizer
from automodel.types import UserError
from tests.unit.rows import load_sft


@pytest.fixture
def minimind(shared_data):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "templates" / "tok_minimind")


def load_case(shared_data, name, tokenizer, *, rows="rows.jsonl", template=None, **options):
    folder = shared_data / "cases" / name
    if template is not None:
        template = str(shared_data / template if template.startswith("templates") else folder / template)
    source = FileDataset(path=str(folder / rows), chat_template=template, max_length=10**6, **options)
    return load_sft(source, tokenizer, model_max_length=None)


def supervised(tokenizer, example):
    return tokenizer.decode([label for label in example["labels"] if label != -100])


def thoughtful(thought, *, key=None, more=()):
    content = "2" if key else f"<think>\n{thought}\n</think>\n\n2"
    answer = {"role": "assistant", "content": content} | ({key: thought} if key else {})
    return [{"role": "user", "content": "1+1?"}, answer, *more]


@pytest.mark.parametrize("template", ["r1_distill_like.jinja", "r1_distill_special.jinja"])
def test_thought_in_a_content_that_is_cut_off_is_named(shared_data, minimind, template):
    expected = r"rows\.jsonl:1: the chat template leaves out the thought '<think> 1 and 1 make 2.*' of message 2"
    with pytest.raises(UserError, match=expected):
        load_case(shared_data, "think-in-content", minimind, template=template)


def writes(expression):
    """Return a template that writes of each message what ``expression`` gives."""
    return "{% for m in messages %}{{ '<' + m.role + '>' }}" + expression + "{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("expression", "lost"),
    [
        ("{{ m.content.split('</think>')[-1] }}", "the thought '<think> well, so </think>'"),
        ("{{ m.content.split('<think>')[0] + m.content.split('</think>')[-1] }}", "the thought"),
        ("{{ m.content.split('</think>')[0] }}", ""),
        ("{{ m.content.split('\\n')[0] }}", ""),
        ("{{ m.content.replace('well, so', '') }}", "the thought '<think> well, so </think>'"),
        ("{{ m.content.replace('2', '') }}", "a part '2'"),
    ],
)
def test_part_of_a_content_that_is_cut_off_is_named(expression, lost):
    tokenizer = build_char_tokenizer()
    tokenizer.chat_template = writes(expression)
    with pytest.raises(BadRow, match=f"the chat template leaves out {lost}.*message 2 "):
        tokenize_messages(tokenizer, Messages(thoughtful("well, so")))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
def test_thought_is_rendered_under_the_name_that_the_template_reads(key, read):
    tokenizer = build_char_tokenizer()
    tokenizer.chat_template = writes(f"{{% if m.{read} %}}[{{{{ m['{read}'] }}}}]{{% endif %}}{{{{ m.content }}}}")
    tokens = tokenize_messages(tokenizer, Messages(thoughtful("well, so", key=key)))
    assert tokenizer.decode(tokens.ids) == "<user>1+1?</s><assistant>[well, so]2</s>"


@pytest.mark.parametrize("name", ["rows", "rows_reasoning_content"])
def test_case_of_the_other_name_is_trained_with_its_thought(shared_data, minimind, name):
    template = "templates/trl_qwen3.jinja"
    prepared = load_case(shared_data, "thought-other-key", minimind, rows=f"{name}.jsonl", template=template)
    answer = supervised(minimind, prepared.examples[0])
    assert answer == "<think>\nAdding 1 twice gives 2.\n</think>\n\n2<|im_end|>"


def test_different_thoughts_under_two_names_are_refused():
    row = Messages(thoughtful("a", key="thinking"))
    row.turns[1]["reasoning"] = "b"
    with pytest.raises(BadRow, match="different thoughts under reasoning and thinking"):
        tokenize_messages(build_char_tokenizer(), row)


@pytest.mark.parametrize("key", [None, "thinking"])
def test_thoughts_of_earlier_turns_are_counted_where_the_last_is_written(shared_data, minimind, caplog, tmp_path, key):
    more = thoughtful("Twice.", key=key)
    rows = [{"messages": thoughtful("Once.", key=key, more=more)}, {"messages": thoughtful("Once.", key=key)}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FileDataset(
        path=str(tmp_path / "rows.jsonl"), chat_template=str(shared_data / "templates" / "trl_qwen3.jinja")
    )
    with caplog.at_level(logging.INFO, logger="automodel"):
        prepared = load_sft(source, minimind, model_max_length=None)
    assert prepared.counts.notes == {THOUGHTS_LEFT_OUT: 2}
    assert f"2 of 4 rows: {THOUGHTS_LEFT_OUT}" in caplog.text
    assert supervised(minimind, prepared.examples[0]) == "2<|im_end|><think>\nTwice.\n</think>\n\n2<|im_end|>"
    assert supervised(minimind, prepared.examples[1]) == "<think>\nOnce.\n</think>\n\n2<|im_end|>"


def test_thought_before_a_call_may_be_left_out_once_the_answer_follows():
    tokenizer = build_char_tokenizer()
    thought = "{% if m.thinking and loop.last %}[{{ m.thinking }}]{% endif %}"
    tokenizer.chat_template = writes(thought + "{{ m.content }}" + calls("{{ c.function.arguments | tojson }}"))
    turns = [CALLING[0], CALLING[1] | {"thinking": "Look."}, CALLING[2], CALLING[3] | {"thinking": "Say."}]
    tokens = tokenize_messages(tokenizer, Messages(turns))
    assert tokens.notes == (THOUGHTS_LEFT_OUT,)
    assert tokenizer.decode(tokens.ids).endswith("<assistant>[Say.]It is 21.</s>")


def test_thought_of_an_earlier_turn_that_no_turn_would_show_is_refused():
    tokenizer = build_char_tokenizer()
    tokenizer.chat_template = writes("{{ m.content }}")
    more = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    with pytest.raises(BadRow, match="leaves out the thought 'well' of message 2"):
        tokenize_messages(tokenizer, Messages(thoughtful("well", key="reasoning", more=more)))


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}}
CALLING = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "content": "21"},
    {"role": "assistant", "content": "It is 21."},
]


def calls(arguments):
    return "{% for c in m.tool_calls or [] %}{{ c.function.name }}" + arguments + "{% endfor %}"


@pytest.mark.parametrize(
    ("expression", "lost"),
    [
        ("{{ m.content }}", "the call 'get_weather' of message 2"),
        ("{{ m.content }}" + calls(""), "the argument 'city' of message 2"),
        ("{{ m.content }}" + calls("{{ c.function.arguments | list }}"), "the argument 'Rome' of message 2"),
        ("{% if m.role != 'tool' %}{{ m.content }}{% endif %}" + calls("{{ c.function.arguments }}"), "message 3"),
        (
            "{{ m.content if not m.tool_calls else '' }}" + calls("{{ c.function.arguments }}"),
            r"message 2 \(role assistant\)",
        ),
    ],
)
def test_part_of_a_call_or_a_result_that_is_left_out_is_named(expression, lost):
    tokenizer = build_char_tokenizer()
    tokenizer.chat_template = writes(expression)
    with pytest.raises(BadRow, match=f"the chat template leaves out {lost}"):
        tokenize_messages(tokenizer, Messages(CALLING))


def test_arguments_written_as_python_does_are_whole():
    tokenizer = build_char_tokenizer()
    tokenizer.chat_template = writes("{{ m.content }}" + calls("{{ c.function.arguments }}"))
    tokens = tokenize_messages(tokenizer, Messages(CALLING))
    assert "I look.get_weather{'city': 'Rome', 'days': 2}</s>" in tokenizer.decode(tokens.ids)


def test_contents_written_as_json_are_whole():
    tokenizer = build_char_tokenizer()
    tokenizer.chat_template = writes("{{ m.content | tojson }}")
    turns = [{"role": "user", "content": 'Say "a\\b"\n.'}, {"role": "assistant", "content": '"c"\nd'}]
    tokens = tokenize_messages(tokenizer, Messages(turns))
    assert tokenizer.decode(tokens.ids).endswith('<assistant>"\\"c\\"\\nd"</s>')


def test_arguments_given_as_text_are_written_as_given(shared_data, minimind):
    prepared = load_case(shared_data, "string-arguments-template", minimind, template="deepseek_like.jinja")
    call = '<call>get_weather\n```json\n{"city": "town 0"}\n```</call>'
    assert supervised(minimind, prepared.examples[0]) == f"{call}<|im_end|>It is 21 degrees.<|im_end|>"


def test_numbers_in_arguments_keep_their_spelling_where_the_template_takes_text(shared_data, minimind):
    given = '{"zeta": 1.0, "alpha": "café", "price": 1e3}'
    spelt_anew = given.replace("1e3", "1000.0")
    for template, written in [("trl_qwen3", given), ("trl_qwen2_5", spelt_anew)]:
        prepared = load_case(shared_data, "argument-text-kept", minimind, template=f"templates/{template}.jinja")
        assert f'{{"name": "get_weather", "arguments": {written}}}' in supervised(minimind, prepared.examples[0])
        assert prepared.counts.notes == ({} if written == given else {RESPELT: 12})


def test_arguments_given_as_text_are_no_quoted_text_where_the_template_writes_json(shared_data, minimind):
    template = "templates/trl_qwen2_5.jinja"
    prepared = load_case(shared_data, "string-arguments-template", minimind, template=template)
    assert '"arguments": {"city": "town 0"}}' in supervised(minimind, prepared.examples[0])


def test_name_of_a_call_may_come_again_in_the_result(shared_data, minimind):
    prepared = load_case(shared_data, "tool-name-repeated", minimind, template="own.jinja")
    call = 'call get_weather {"city": "town 0"}<|im_end|>'
    assert supervised(minimind, prepared.examples[0]) == f"{call}It is 21 degrees.<|im_end|>"


def test_name_of_a_call_may_come_again_without_generation_marks():
    tokenizer = build_char_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{% if m.role == 'tool' %}{{ '<' + messages[loop.index0 - 1].tool_calls[0].function.name + '>' + m.content }}"
        "{% else %}{{ '<' + m.role + '>' + m.content }}{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokens = tokenize_messages(tokenizer, Messages(CALLING))
    text = "".join(t for t, w in zip(tokenizer.convert_ids_to_tokens(tokens.ids), tokens.weights, strict=True) if w)
    assert text == 'I look.get_weather{"city": "Rome", "days": 2}</s>It is 21.</s>'


def test_eos_in_a_generation_block_of_its_own_goes_with_the_last_answer(shared_data, minimind):
    prepared = load_case(shared_data, "generation-block-of-eos", minimind, template="own.jinja")
    lines = (shared_data / "cases" / "generation-block-of-eos" / "rows.jsonl").read_text().splitlines()
    answer = json.loads(lines[0])["messages"][1]["content"]
    assert supervised(minimind, prepared.examples[0]) == f"{answer}<|im_end|><|endoftext|>"
    assert minimind.decode(prepared.prompts[0].prompt_ids).endswith("<|im_start|>assistant\n")
    assert prepared.prompts[0].answer.strip() == answer
    assert prepared.stops.ids == {minimind.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}


class Counted(str):
    """Text that counts the characters taken out of it or searched."""

    characters = 0

    def __getitem__(self, item):
        part = str.__getitem__(self, item)
        Counted.characters += len(part)
        return part

    def find(self, what, start=0, end=None):
        at = str.find(self, what, start, len(self) if end is None else end)
        Counted.characters += (len(self) if at < 0 else at) - start
        return at


@pytest.mark.parametrize("key", [None, "reasoning_content"])
def test_work_on_a_row_grows_with_its_length_and_not_its_square(minimind, monkeypatch, key):
    plain = spans.render
    monkeypatch.setattr(spans, "render", lambda *args, **options: Counted(plain(*args, **options)))

    def work(num_words):
        thought = " ".join(f"so {number}" for number in range(num_words))
        calls = []
        real = type(minimind).__call__
        with monkeypatch.context() as patch:
            patch.setattr(
                type(minimind), "__call__", lambda self, text, **o: calls.append(len(text)) or real(self, text, **o)
            )
            Counted.characters = 0
            tokenize_messages(minimind, Messages(thoughtful(thought, key=key)))
        return Counted.characters, sum(calls)

    (some, some_tokenised), (twice, twice_tokenised) = work(1000), work(2000)
    assert twice < 2.5 * some
    assert twice_tokenised < 2.5 * some_tokenised


def test_old_names_of_calls_are_read():
    turns, _ = read_turns(
        [
            {"role": "user", "content": "?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}],
            },
        ],
        "messages",
    )
    assert turns[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'


HARMONY = (
    "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}"
    "{% if m.thinking and loop.index0 + 2 >= messages | length %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{% set call = m.tool_calls[0].function %}"
    "{{ '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}"
    "{{ call.arguments | tojson + '<|call|>' }}"
    "{% elif m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{% elif m.role == 'tool' %}{% set call = messages[loop.index0 - 1].tool_calls[0].function %}"
    "{{ '<|start|>functions.' + call.name + ' to=assistant<|message|>' + m.content | tojson + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


def test_template_of_channels_with_thoughts_calls_and_results():
    tokenizer = build_char_tokenizer()
    marks = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = HARMONY
    call = {"function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
    turns, _ = read_turns(
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "thinking": "Look.", "tool_calls": [call]},
            {"role": "tool", "content": "21"},
            {"role": "assistant", "content": "It is 21.", "thinking": "Say."},
        ],
        "messages",
    )
    tokens = tokenize_messages(tokenizer, Messages(turns))
    assert tokens.notes == (THOUGHTS_LEFT_OUT,)
    text = "".join(t for t, w in zip(tokenizer.convert_ids_to_tokens(tokens.ids), tokens.weights, strict=True) if w)
    assert text == (
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'
        "<|channel|>analysis<|message|>Say.<|end|><|start|>assistant<|channel|>final<|message|>It is 21.<|return|>"
    )
