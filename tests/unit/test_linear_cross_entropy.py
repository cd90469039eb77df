"""The loss from supervised positions alone equals the one from all logits, for output layers of every kind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from automodel.data.batches.batch import Batch
from automodel.data.batches.collate import CausalLMCollator, RowTargetCollator
from automodel.losses.cross_entropy import CrossEntropy
from automodel.losses.linear_cross_entropy import LinearCrossEntropy
from automodel.losses.output_layer import LogitTransform, output_layer
from automodel.types import UserError
from tests.dist.tiny import VOCAB, tiny_llama, uneven_rows

RELATIVE = 2e-6  # float32 sums in another order


def tiny(kind: str, **more: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**sizes | more)
    return transformers.AutoModelForCausalLM.from_config(config)


MODELS = {
    "tied": (lambda: tiny_llama(tied=True), LogitTransform()),
    "untied": (lambda: tiny_llama(tied=False), LogitTransform()),
    "bias": (lambda: tiny("Phi"), LogitTransform()),
    "capped": (lambda: tiny("Gemma2", head_dim=4, final_logit_softcapping=0.5), LogitTransform(cap=0.5)),
    "multiplied": (lambda: tiny("Cohere", logit_scale=0.25), LogitTransform(scale=0.25)),
    "divided": (lambda: tiny("Granite", logits_scaling=8.0), LogitTransform(scale=1 / 8)),
    "experts": (lambda: tiny("Mixtral", num_local_experts=4), LogitTransform()),
    "gpt2": (lambda: tiny("GPT2", n_embd=16, n_layer=2, n_head=4, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0),
             LogitTransform()),
}  # fmt: skip
LOSSES = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z": {"z_loss": 1e-2},
    "both": {"label_smoothing": 0.2, "z_loss": 1e-2},
}


def weighted(batch: Batch) -> Batch:
    weights = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(0))
    return Batch(batch.inputs, batch.labels, weights)


def loss_and_gradients(loss: CrossEntropy, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    value = loss(model, batch)
    (0.5 * value).backward()
    return value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(model: nn.Module, batch: Batch, *, relative: float = RELATIVE, chunk_size: int | None = 5, **options):
    expected = loss_and_gradients(CrossEntropy(**options), model, batch)
    got = loss_and_gradients(LinearCrossEntropy(**options, chunk_size=chunk_size), model, batch)
    torch.testing.assert_close(got[0], expected[0], rtol=relative, atol=relative)
    assert got[1].keys() == expected[1].keys()
    largest = max(gradient.abs().max().item() for gradient in expected[1].values())
    for name, gradient in expected[1].items():
        torch.testing.assert_close(got[1][name], gradient, rtol=0, atol=5 * relative * largest, msg=name)
    with torch.no_grad():
        measured = LinearCrossEntropy(**options, chunk_size=chunk_size)(model, batch)
    torch.testing.assert_close(measured, expected[0], rtol=relative, atol=relative)


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_output_layer_gives_the_loss_and_gradients_of_all_logits(kind):
    make, transform = MODELS[kind]
    model = make()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.mul_(20).add_(0.01)  # large logits, and a bias that is not 0
    compare(model, CausalLMCollator(0)(uneven_rows(5)))
    assert output_layer(model).transform == transform


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("kind", ["untied", "bias", "capped", "divided"])
def test_options_and_weights_apply(kind, options):
    batch = CausalLMCollator(0)(uneven_rows(5))
    model = MODELS[kind][0]()
    compare(model, batch, **options)
    compare(model, weighted(batch), **options)


def test_options_are_those_of_their_definitions():
    model, batch = tiny_llama(), CausalLMCollator(0)(uneven_rows(3))
    log_p = model(**batch.inputs).logits.double().log_softmax(-1)[batch.labels != -100]
    labels, logits = batch.labels[batch.labels != -100], model(**batch.inputs).logits[batch.labels != -100].double()
    target = torch.full_like(log_p, 0.2 / VOCAB)
    target[torch.arange(len(labels)), labels] += 0.8
    expected = -(target * log_p).sum() + 0.01 * logits.logsumexp(-1).square().sum()
    for kind in (CrossEntropy, LinearCrossEntropy):
        assert kind(label_smoothing=0.2, z_loss=0.01)(model, batch).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("masked", [(0, 1, 2), (1,)])
def test_rows_without_a_label_add_nothing_and_keep_every_gradient(masked):
    model = tiny_llama(tied=False)
    compare(model, CausalLMCollator(0)(uneven_rows(3, masked=masked)))
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_no_logits_exist_at_positions_without_a_label():
    class Largest(TorchDispatchMode):
        num_rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == VOCAB:
                    self.num_rows = max(self.num_rows, tensor.numel() // VOCAB)
            return result

    model, batch = tiny_llama(), CausalLMCollator(0)(uneven_rows(8))
    assert batch.num_label_tokens < batch.labels.numel()
    for chunk_size, largest in ((None, batch.num_label_tokens), (16, 16)):
        with Largest() as seen:
            LinearCrossEntropy(chunk_size=chunk_size)(model, batch).backward()
        assert seen.num_rows == largest


@pytest.mark.parametrize("chunk_size", [5, None])
def test_an_adapted_output_layer_is_scored_through_its_adapters(chunk_size):
    model = get_peft_model(
        tiny_llama(tied=False), LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    )
    compare(model, CausalLMCollator(0)(uneven_rows(5)), chunk_size=chunk_size, label_smoothing=0.1)


def test_a_frozen_output_layer_gets_no_gradient():
    model = tiny_llama(tied=False)
    model.lm_head.weight.requires_grad_(False)
    compare(model, CausalLMCollator(0)(uneven_rows(5)))
    assert model.lm_head.weight.grad is None


def test_mixed_precision_computes_the_logits_as_the_plain_loss_does():
    model, batch = tiny_llama(tied=False), CausalLMCollator(0)(uneven_rows(5))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compare(model, batch, relative=4e-3)  # bf16's products; sums over chunks are float32


class Squared(nn.Module):
    """A causal language model that squares its logits, which only its own forward knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_llama(tied=False)
        self.config = self.inner.config

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.lm_head

    def forward(self, **inputs: object) -> SimpleNamespace:
        return SimpleNamespace(logits=self.inner(**inputs).logits.square())


def test_a_transform_that_only_the_model_knows_is_left_to_it():
    model = Squared()
    compare(model, CausalLMCollator(0)(uneven_rows(5)), label_smoothing=0.1)
    assert output_layer(model).transform is None


def test_a_model_without_an_output_layer_gets_the_plain_loss():
    torch.manual_seed(0)
    config = tiny_llama().config
    config.num_labels, config.pad_token_id = 3, 0
    model = transformers.LlamaForSequenceClassification(config)
    rows = [row | {"labels": number} for number, row in enumerate(uneven_rows(3))]
    compare(model, RowTargetCollator(0)(rows))
    assert output_layer(model) is None


def test_labels_of_another_shape_than_the_positions_are_refused():
    batch = CausalLMCollator(0)(uneven_rows(3))
    with pytest.raises(UserError, match=r"hidden states of the shape \[3, .*use loss_fn=cross_entropy"):
        LinearCrossEntropy()(tiny_llama(), Batch(batch.inputs, batch.labels[:, :2].contiguous()))
    assert "forward" not in vars(tiny_llama())


def test_the_model_is_as_before_afterwards():
    model, batch = tiny_llama(), CausalLMCollator(0)(uneven_rows(3))
    before = model(**batch.inputs).logits
    LinearCrossEntropy()(model, batch)
    torch.testing.assert_close(model(**batch.inputs).logits, before, rtol=0, atol=0)
    assert "forward" not in vars(model) and isinstance(model.lm_head, nn.Linear)
