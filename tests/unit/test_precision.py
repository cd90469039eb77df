"""In which types weights are held, trained, computed with and written."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from automodel.distributed.parallel.precision import convert_weights_, resolve_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
F32, BF16 = torch.float32, torch.bfloat16

# model.dtype, distributed.mixed_precision, frozen, device: held, trained, computed, written
CASES = [
    ("auto", "auto", False, CPU, (F32, F32, F32, F32)),
    ("auto", "auto", False, CUDA, (F32, F32, BF16, F32)),
    ("bfloat16", "auto", False, CPU, (F32, F32, BF16, BF16)),
    ("bfloat16", "auto", False, CUDA, (F32, F32, BF16, BF16)),
    ("bfloat16", "float32", False, CUDA, (F32, F32, F32, BF16)),
    ("float32", "bf16", False, CPU, (F32, F32, BF16, F32)),
    ("auto", "pure_bf16", False, CPU, (BF16, BF16, BF16, BF16)),
    ("bfloat16", "pure_bf16", False, CUDA, (BF16, BF16, BF16, BF16)),
    ("auto", "auto", True, CPU, (F32, F32, F32, F32)),
    ("auto", "auto", True, CUDA, (BF16, F32, BF16, F32)),
    ("auto", "bf16", True, CPU, (BF16, F32, BF16, F32)),
    ("auto", "float32", True, CUDA, (F32, F32, F32, F32)),
    ("bfloat16", "auto", True, CPU, (BF16, F32, BF16, BF16)),
    ("float32", "auto", True, CUDA, (F32, F32, BF16, F32)),
]


@pytest.mark.parametrize(("dtype", "mixed_precision", "is_frozen", "device", "expected"), CASES)
def test_trained_weights_are_float32_unless_pure_bf16_is_asked_for(dtype, mixed_precision, is_frozen, device, expected):
    got = resolve_precision({"dtype": dtype}, {"mixed_precision": mixed_precision}, is_frozen=is_frozen, device=device)
    assert (got.held, got.trained, got.computed, got.written) == expected


def test_sections_of_the_users_own_need_not_have_the_keys():
    got = resolve_precision({}, {}, is_frozen=False, device=CPU)
    assert (got.held, got.computed, got.of_strategy) == (F32, F32, {})


def test_pure_bf16_is_a_warning_of_one_line(caplog):
    resolve_precision({}, {"mixed_precision": "bf16"}, is_frozen=False, device=CPU)
    assert not caplog.text
    resolve_precision({}, {"mixed_precision": "pure_bf16"}, is_frozen=False, device=CPU)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "sums of gradients are rounded to bf16" in record.message


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_trained_weights_become_float32_and_frozen_ones_and_ties_stay(device):
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "other": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
    model.to(device=device, dtype=BF16)
    model["other"].weight = model["one"].weight
    model["frozen"].requires_grad_(False)
    convert_weights_(model, F32, only_trained=True)
    assert model["other"].weight is model["one"].weight
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == {
        "one.weight": F32, "one.bias": F32, "other.bias": F32, "frozen.weight": BF16, "frozen.bias": BF16,
    }  # fmt: skip
