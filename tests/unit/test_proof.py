"""The comparison of tokens with their text finds what is wrong with either."""

import json

import pytest

from automodel.data.chat.conversation import tokenize_messages
from automodel.data.formats.samples import Messages, PromptCompletion
from automodel.data.prepare import proof
from automodel.data.prepare.proof import difference_of, prove
from automodel.data.prepare.tokenize import tokenize_completion
from automodel.data.sources import FileDataset
from tests.unit.rows import load_sft
from tests.unit.tiny_tokenizers import KINDS, build

TURNS = [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": "Once upon a time.</s>"}]


@pytest.fixture(params=KINDS)
def tokenizer(request):
    tokenizer = build(request.param)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}"
        "{{ eos_token if m.role == 'assistant' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    return tokenizer


def test_right_tokens_have_no_difference(tokenizer):
    plain = [TURNS[0], {"role": "assistant", "content": "Once upon a time."}]
    rows = [Messages(TURNS), Messages(plain), PromptCompletion("Tell me.", "Once upon")]
    assert prove(tokenizer, [(str(n), row) for n, row in enumerate(rows)], supervise="all") == (3, [])


def test_other_tokens_and_other_supervision_are_found(tokenizer):
    tokens = tokenize_messages(tokenizer, Messages([TURNS[0], {"role": "assistant", "content": "Once upon."}]))
    assert difference_of(tokenizer, tokens, is_conversation=True) is None
    at = tokens.num_prompt
    other = tokens._replace(ids=[*tokens.ids[:at], tokens.ids[at] + 1, *tokens.ids[at + 1 :]])
    found = difference_of(tokenizer, other, is_conversation=True)
    assert found == f"its tokens differ from those of the whole text, first at token {at}"
    late = [0.0] * (at + 2) + tokens.weights[at + 2 :]
    found = difference_of(tokenizer, tokens._replace(weights=late), is_conversation=True)
    assert found.startswith("its supervised tokens read ") and found.endswith("which is not 'Onceupon.</s>'")
    completion = tokenize_completion(tokenizer, PromptCompletion("Tell me.\n", "Once upon"))
    assert difference_of(tokenizer, completion, is_conversation=False) is None
    cut = completion._replace(ids=[*completion.ids[:2], *completion.ids[3:]])
    assert "first at token" in difference_of(tokenizer, cut, is_conversation=False)


def test_rows_of_the_cache_are_compared_too(tmp_path, monkeypatch):
    tokenizer = build("legacy")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Tell me.", "completion": " Once."}) + "\n")

    def load():
        return load_sft(FileDataset(path=str(tmp_path / "rows.jsonl")), tokenizer, model_max_length=None)

    assert load().proof == (1, [])
    monkeypatch.setattr(proof, "difference_of", lambda *args, **options: "broken")
    assert load().proof == (1, [f"{tmp_path}/rows.jsonl:1: broken"])
