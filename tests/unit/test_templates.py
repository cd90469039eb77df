"""Values given to a chat template hold in training, in prompts, and wherever the saved tokenizer is loaded."""

import json

import pytest

from automodel.config import load_config
from automodel.data.chat.templates import set_chat_template
from automodel.data.prepare.cache import hash_of
from automodel.data.prepare.cache_key import rows_key
from automodel.data.sources import FileDataset
from automodel.models.char_tokenizer import build_char_tokenizer
from automodel.tasks.causal_lm import CausalLM
from automodel.types import UserError
from tests.unit.rows import load_sft

TURNS = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]


@pytest.fixture
def minimind(shared_data):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shared_data / "templates" / "tok_minimind")


@pytest.fixture
def source(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")

    def make(**options):
        return FileDataset(path=str(tmp_path / "rows.jsonl"), **options)

    return make


def test_values_reach_training_and_the_saved_tokenizer(shared_data, minimind, source, tmp_path):
    from transformers import AutoTokenizer

    file = tmp_path / "template.jinja"
    file.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ date }}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {{ date }}{% if not deep %}-{% endif %}{% endif %}"
    )
    values = {"date": '1 "May" é\n', "deep": False}
    prepared = load_sft(source(chat_template=str(file), chat_template_kwargs=values), minimind, model_max_length=None)
    text = minimind.decode(prepared.examples[0]["input_ids"])
    assert text == '<|im_start|>user 1 "May" é\n1+1?<|im_end|>\n<|im_start|>assistant 1 "May" é\n2<|im_end|>\n'
    minimind.save_pretrained(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert loaded.apply_chat_template(TURNS, tokenize=False) == text
    assert loaded.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True).endswith("é\n-")
    other = loaded.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True, date="", deep=True)
    assert other == "<|im_start|>user 1+1?<|im_end|>\n<|im_start|>assistant "


def test_no_thinking_gives_the_prompt_of_a_model_that_does_not_think(shared_data, minimind, source):
    template = str(shared_data / "templates" / "trl_qwen3.jinja")
    options = source(chat_template=template, chat_template_kwargs={"enable_thinking": False})
    prepared = load_sft(options, minimind, model_max_length=None)
    prompt = minimind.apply_chat_template(TURNS[:1], add_generation_prompt=True)["input_ids"]
    assert prepared.prompts[0].prompt_ids == prompt
    assert minimind.decode(prompt).endswith("assistant\n<think>\n\n</think>\n\n")
    assert prepared.prompts[0].answer == "2"


def test_values_are_part_of_what_names_the_cache(minimind, source):
    options = [source(chat_template_kwargs={"open_thinking": value}) for value in (True, False)]
    others = {"task": CausalLM(), "reader": None, "keeps_prompts": False}
    names = {hash_of(rows_key(each, minimind, each.options(None), **others)) for each in options}
    assert len(names) == 2


@pytest.mark.parametrize(
    "written", ["chat_template_kwargs={enable_thinking: false}", "chat_template_kwargs.enable_thinking=false"]
)
def test_values_are_given_on_the_command_line_without_a_plus(tmp_path, written):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    names = ("dataset", "validation_dataset")
    cfg = load_config([
        *(argument for name in names for argument in (f"{name}=jsonl", f"{name}.path={tmp_path}/rows.jsonl")),
        *(f"{name}.{written}" for name in names),
    ])  # fmt: skip
    for section in (cfg.dataset, cfg.validation_dataset):
        assert section["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("name", ["enable_thinkng", "messages", "bos_token"])
def test_variable_that_the_template_has_not_is_refused(shared_data, minimind, name):
    template = str(shared_data / "templates" / "trl_qwen3.jinja")
    with pytest.raises(UserError, match=rf"chat_template_kwargs\.{name}: .* no such variable; it has: enable_thinking"):
        set_chat_template(minimind, template, {name: "x"})


@pytest.mark.parametrize("beginning", ["\n", "  ", "\n  {% if x %}a{% endif %}\n"])
def test_template_is_otherwise_as_it_was(beginning, tmp_path):
    tokenizer = build_char_tokenizer()
    file = tmp_path / "template.jinja"
    file.write_text(beginning + "{{ x }}{% for m in messages %}{{ m.content }}{% endfor %}")
    set_chat_template(tokenizer, str(file))
    plain = tokenizer.apply_chat_template(TURNS, tokenize=False, x=["b", None, {"c": 1.5}])
    set_chat_template(tokenizer, str(file), {"x": ["b", None, {"c": 1.5}]})
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == plain
    before = tokenizer.chat_template
    set_chat_template(tokenizer, None, {"x": ["b", None, {"c": 1.5}]})
    assert tokenizer.chat_template == before


def test_built_in_template_takes_tools_and_their_calls():
    tokenizer = build_char_tokenizer()
    set_chat_template(tokenizer, "chatml")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "So:", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]
    text = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)
    assert text.startswith('<|im_start|>system\nS\n\nThese functions can be called:\n<tools>\n{"type": "function", ')
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    assert text.endswith(f"<|im_start|>assistant\nSo:\n{called}\n{called}</s>\n<|im_start|>tool\n2</s>\n")
    assert text.count("S\n\n") == 1
