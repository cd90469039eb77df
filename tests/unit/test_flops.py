"""Model FLOPs utilisation, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from automodel.models.adapters import LoRA
from automodel.tasks.causal_lm import CausalLM
from automodel.train.flops import TrainingFlops, peak_flops_per_sec, training_flops
from automodel.train.meter import Meter

LAYER = 4 * 4 + 2 * 4 + 2 * 4 + 4 * 4 + 3 * 4 * 8  # q, k, v, o and three of the MLP
HEAD = 10 * 4
ADAPTERS_OF_A_LAYER = (4 + 4) + (4 + 2) + (4 + 2) + (4 + 4) + 3 * (4 + 8)  # of rank 1
ATTENTION = 12 * 2 * 2 * 2  # layers, heads, their size


def llama(*, tied: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, tie_word_embeddings=tied)  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_weight_takes_six_flops_a_token_and_a_look_up_none(tied):
    assert training_flops(llama(tied=tied)) == TrainingFlops(6 * 2 * LAYER, ATTENTION, 6 * HEAD)


@pytest.mark.parametrize("tied", [True, False])
def test_a_frozen_weight_takes_four(tied):
    model = LoRA(rank=1, alpha=1, target_modules="all-linear").apply(llama(tied=tied), task=CausalLM())
    expected = 4 * 2 * LAYER + 6 * 2 * ADAPTERS_OF_A_LAYER
    assert training_flops(model) == TrainingFlops(expected, ATTENTION, 4 * HEAD)


def test_a_token_takes_its_own_experts_alone():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=10, hidden_size=4, moe_intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=2,
        num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[],
    )  # fmt: skip
    attention, router, experts = 4 * 4 + 2 * 4 + 2 * 4 + 4 * 4, 4 * 4, 2 * 3 * 4 * 8
    assert training_flops(Qwen3MoeForCausalLM(config)).per_token == 6 * (attention + router + experts)


def test_peaks_go_by_the_exact_name():
    for name, tflops in {
        "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 PCIe": 756.0, "NVIDIA H100 NVL": 835.5, "NVIDIA H200": 989.4,
        "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA B200": 2250.0, "NVIDIA L40S": 362.05, "NVIDIA GeForce RTX 4090": 165.2,
    }.items():  # fmt: skip
        assert peak_flops_per_sec(name) == tflops * 1e12
    for name in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H20", ""):
        assert peak_flops_per_sec(name) is None


class Event:
    """Comes half a second after the one before it."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now = getattr(Event, "now", 0) + 500

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_utilisation_is_the_models_arithmetic_over_the_devices_own_time(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    meter = Meter(torch.device("cuda", 0), world_size=2, flops=TrainingFlops(1e12, 1e9, 1e11))
    for _ in range(2):
        with meter.training():
            # Two documents of 50 tokens, 30 of them supervised.
            meter.count(SimpleNamespace(num_label_tokens=30, num_tokens=100, num_slots=100, sum_squared_lengths=5000))
        Event(enable_timing=True).record()  # something between two steps, such as a validation
    figures = meter.read()
    assert figures["step_time_sec"] == 0.5 and figures["tokens_per_sec"] == 200
    assert figures["mfu"] == pytest.approx(2 * (100e12 + 5e12 + 3e12) / 1.0 / (2 * 756e12))
