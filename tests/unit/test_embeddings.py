"""Tokens that the model's embedding has no row for are reported, or get one, in the model and beside adapters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from automodel.hf_export.write import export_model
from automodel.models.adapters import LoRA
from automodel.models.char_tokenizer import build_char_tokenizer
from automodel.models.embeddings import new_token_ids, require_embeddings
from automodel.models.hf import HFModel, ScratchModel, build_unfilled
from automodel.preview import main
from automodel.tasks.causal_lm import CausalLM
from automodel.types import UserError


@pytest.fixture(scope="module", params=[False, True], ids=["own output", "tied output"])
def saved(request, tmp_path_factory) -> Path:
    """A tiny model whose tokenizer has two tokens more than its embedding has rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_char_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=request.param,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.add_tokens(["<|a|>", "<|b|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def rows_of(model) -> list[torch.Tensor]:
    return [layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.get_output_embeddings())]


def test_ids_without_a_row_are_named_with_the_remedy(saved, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"q{n}", "completion": "a"}) + "\n" for n in range(3)))
    argv = ["model=hf", f"model.pretrained_model_name_or_path={saved}", "dataset=jsonl", f"dataset.path={path}"]

    def ended(*more: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            main([*argv, *more])
        return end.value.code, capsys.readouterr().err

    assert ended()[0] == 0  # tokens that no row holds do no harm
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content + '<|b|>' }}{% endfor %}")
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    path.write_text(json.dumps({"messages": turns}) + "\n")
    status, told = ended(f"dataset.chat_template={template}")
    size = len(build_char_tokenizer())
    assert status == 2 and f"the token ids {size} (<|a|>), {size + 1} (<|b|>), but the model's embedding" in told
    assert f"has {size} rows (ids 0 to {size - 1}); model.resize_embeddings=true" in told
    assert ended(f"dataset.chat_template={template}", "model.resize_embeddings=true")[0] == 0


def test_an_embedding_may_be_larger_than_the_tokenizer(saved):
    source = HFModel(str(saved), resize_embeddings=True)
    tokenizer = build_char_tokenizer()  # without the added ones
    require_embeddings(source, tokenizer, largest_id=len(tokenizer) - 1)
    assert not new_token_ids(source, tokenizer)
    assert source.build(tokenizer, task=CausalLM()).config.vocab_size == len(tokenizer)


def test_a_fresh_model_of_too_few_rows_is_told_too():
    tokenizer = build_char_tokenizer()
    with pytest.raises(UserError, match=r"model\.config\.vocab_size=\d+ fits"):
        require_embeddings(ScratchModel({"vocab_size": 10}), tokenizer, largest_id=20)
    require_embeddings(ScratchModel({}), tokenizer, largest_id=20)


def test_new_rows_are_the_mean_of_the_others_at_every_load(saved):
    source, plain = HFModel(str(saved), resize_embeddings=True), HFModel(str(saved))
    tokenizer = source.load_tokenizer()
    size = len(tokenizer)
    state = torch.get_rng_state()
    one = source.build(tokenizer, task=CausalLM())
    assert torch.equal(torch.get_rng_state(), state)
    for new, again, old in zip(
        rows_of(one),
        rows_of(source.build(tokenizer, task=CausalLM())),
        rows_of(plain.build(tokenizer, task=CausalLM())),
        strict=True,
    ):
        assert new.shape[0] == size == old.shape[0] + 2 and torch.equal(new, again)
        assert torch.equal(new[:-2], old)
        torch.testing.assert_close(new[-2:], old.mean(dim=0).expand(2, -1))
    unfilled = build_unfilled(source, tokenizer, task=CausalLM(), device="meta")
    assert [rows.shape for rows in rows_of(unfilled)] == [rows.shape for rows in rows_of(one)]


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_exports_hold_the_new_rows_whole_or_beside_adapters(saved, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    source = HFModel(str(saved), resize_embeddings=True)
    tokenizer = source.load_tokenizer()
    ids = new_token_ids(source, tokenizer)
    assert list(ids) == [len(tokenizer) - 2, len(tokenizer) - 1]
    whole = source.build(tokenizer, task=CausalLM())
    adapted = LoRA(rank=2).apply(source.build(tokenizer, task=CausalLM()), task=CausalLM(), new_token_ids=ids)
    inputs = torch.tensor([[5, *ids, 7]])
    for name, model in (("whole", whole), ("adapted", adapted)):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=1.0)
        model(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
        model.zero_grad()
        export_model(
            model, tokenizer, folder=tmp_path / name, load_base=lambda: source.build(tokenizer, task=CausalLM())
        )
        kind = AutoModelForCausalLM if name == "whole" else AutoPeftModelForCausalLM
        loaded = kind.from_pretrained(tmp_path / name)
        with torch.no_grad():
            expected, got = (each.eval()(input_ids=inputs).logits for each in (model, loaded))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        rows = expected[0, :, list(ids)]
        assert not torch.equal(rows[:, 0], rows[:, 1]), "the new rows were not trained"
