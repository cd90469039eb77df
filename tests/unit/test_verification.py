"""What is written is compared with what was trained: rounding and near ties pass, a wrong weight does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from automodel.hf_export.verification import ExportError, compare, digests_of, probe, use_host_attention, verify


def autocast() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def moe(*, tied: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, initializer_range=0.1, num_experts=16, num_experts_per_tok=2,
            moe_intermediate_size=32, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def write(model: PreTrainedModel, folder: Path, fault: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    weights = dict(model.state_dict())
    for alias in model.all_tied_weights_keys:
        weights.pop(alias)
    model.save_pretrained(folder, state_dict=weights)
    file = folder / "model.safetensors"
    save_file(fault(load_file(file)), file, metadata={"format": "pt"})


def swapped_experts(weights: dict[str, Any]) -> dict[str, Any]:
    one, other = (f"model.layers.2.mlp.experts.{number}.down_proj.weight" for number in (3, 4))
    return weights | {one: weights[other], other: weights[one]}


def transposed(weights: dict[str, Any]) -> dict[str, Any]:
    name = "model.layers.1.self_attn.o_proj.weight"
    return weights | {name: weights[name].t().contiguous()}


def a_little_off(weights: dict[str, Any]) -> dict[str, Any]:
    name = "model.layers.1.input_layernorm.weight"
    return weights | {name: weights[name] * 1.01}


FAULTS = {"swapped experts": swapped_experts, "transposed": transposed, "a little off": a_little_off}


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_a_mixture_of_experts_is_verified_in_any_precision_and_a_wrong_weight_is_found(tmp_path, precision):
    model = moe().to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    expected = probe(model, autocast=autocast) if precision == "autocast" else probe(model)
    digests = digests_of(model.state_dict())
    write(model, tmp_path / "good", dict)
    verify(tmp_path / "good", model, expected=expected, digests=digests)
    for name, fault in FAULTS.items():
        write(model, tmp_path / name, fault)
        with pytest.raises(ExportError, match="weights of the written model are not the trained ones: model"):
            verify(tmp_path / name, model, expected=expected, digests=digests)


def test_a_tie_that_is_missing_is_found(tmp_path):
    model = moe()
    write(model, tmp_path, dict)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ExportError, match=r"missing from the files: lm_head.weight"):
        verify(tmp_path, model, expected=probe(model), digests=digests_of(model.state_dict()))


def test_another_configuration_of_the_same_weights_is_found(tmp_path):
    model = moe()
    write(model, tmp_path, dict)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 1}))
    for expected in (probe(model), probe(model, autocast=autocast)):
        with pytest.raises(ExportError, match="does not compute the same as the trained one"):
            verify(tmp_path, model, expected=expected, digests=digests_of(model.state_dict()))


def test_a_few_tokens_that_went_to_another_expert_pass_and_many_do_not():
    expected = probe(moe())
    few, many = expected.logits.clone(), expected.logits.clone()
    few[0, :7] += 1  # of 32 tokens
    many[0, :9] += 1
    compare(replace(expected, logits=few), expected=expected)
    with pytest.raises(ExportError, match="at a quarter of the tokens"):
        compare(replace(expected, logits=many), expected=expected)


def test_a_model_that_computes_nothing_finite_is_told_as_such():
    expected = probe(moe())
    with pytest.raises(ExportError, match="the trained model gives logits that are not finite"):
        compare(expected, expected=replace(expected, logits=expected.logits * torch.nan))


def test_a_copy_on_the_cpu_computes_with_an_attention_that_works_there():
    AttentionInterface.register("only_on_a_device", lambda *args, **options: pytest.fail("this is a CPU"))
    model = moe()
    expected = probe(model)
    model.set_attn_implementation("only_on_a_device")
    use_host_attention(model)
    assert model.config._attn_implementation == "sdpa" and torch.equal(probe(model).logits, expected.logits)


def test_an_exported_configuration_names_no_attention(tmp_path):
    AttentionInterface.register("only_on_a_device", lambda *args, **options: pytest.fail("this is a CPU"))
    model = moe()
    model.set_attn_implementation("only_on_a_device")
    model.save_pretrained(tmp_path)
    assert "only_on_a_device" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
