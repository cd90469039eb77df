"""Activations that are recomputed or kept on the host give the numbers of those that are kept where they are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from automodel.data.batches.collate import CausalLMCollator
from automodel.distributed.parallel import activations
from automodel.distributed.parallel.activations import saved_or_recomputed
from automodel.distributed.parallel.ddp import DDP
from automodel.distributed.parallel.fsdp2 import FSDP2
from automodel.distributed.parallel.megatron_fsdp import MegatronFSDP
from automodel.distributed.parallel.strategy import data_parallel
from automodel.losses.cross_entropy import CrossEntropy
from automodel.losses.objective import as_objective
from automodel.models.adapters import LoRA
from automodel.tasks.causal_lm import CausalLM
from automodel.train.step import StepConfig, train_step
from automodel.types import UserError
from tests.dist import cuda_streams
from tests.dist.tiny import VOCAB, cpu_info, tiny_llama, uneven_rows

MODES: list[dict[str, Any]] = [
    {"activation_checkpointing": "full"},
    {"activation_checkpointing": "selective"},
    {"activation_checkpointing": 2},
    {"activation_offload": True},
    {"activation_offload": True, "activation_checkpointing": 2},
]


def name_of(options: dict[str, Any]) -> str:
    return ", ".join(f"{name.removeprefix('activation_')}={value}" for name, value in options.items())


def with_dropout() -> nn.Module:
    """Three layers that drop out of attention and of both residual branches."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=16, n_layer=3, n_head=2, attn_pdrop=0.3, resid_pdrop=0.3,
                   embd_pdrop=0.3)
    )  # fmt: skip


def with_adapters() -> nn.Module:
    return LoRA(rank=2, dropout=0.3).apply(tiny_llama(), task=CausalLM())


MODELS = {"llama": tiny_llama, "dropout": with_dropout, "adapters": with_adapters}


class LocalGradients(torch.optim.Optimizer):
    """Keeps this rank's part of the gradients that a step hands to its optimizer."""

    def __init__(self, trained: list[nn.Parameter]) -> None:
        super().__init__(trained, {})
        self.caught: list[torch.Tensor] = []

    def step(self) -> None:
        gradients = [parameter.grad for parameter in self.param_groups[0]["params"]]
        self.caught = [getattr(gradient, "_local_tensor", gradient).clone() for gradient in gradients]


def one_step(strategy_class: type, options: dict[str, Any], model_name: str) -> tuple[float, list[torch.Tensor]]:
    """Return the loss and the gradients of a step of two micro-batches on this rank."""
    strategy, info = strategy_class(**options), cpu_info()
    mesh = strategy.build_mesh(info)
    dp = data_parallel(mesh)
    model = strategy.parallelize(MODELS[model_name]().train(), dist_info=info, mesh=mesh)
    catcher = LocalGradients([parameter for parameter in model.parameters() if parameter.requires_grad])
    config = StepConfig(info.device, dp.group, True, 1.0, lambda: strategy.autocast(info.device))
    rows = uneven_rows(8)[4 * dp.rank : 4 * dp.rank + 4]
    micro_batches = [CausalLMCollator(0)(rows[:2]), CausalLMCollator(0)(rows[2:])]
    torch.manual_seed(dp.rank)
    result = train_step(model, micro_batches, objective=as_objective(CrossEntropy()), optimizer=catcher, config=config)
    return result.loss_sum.item(), catcher.caught


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize(("world", "strategy_class"), [(1, DDP), (2, DDP), (2, FSDP2)])
def test_a_step_is_the_same_to_the_last_bit(ranks, world, strategy_class, model_name):
    expected = ranks[world].run(one_step, strategy_class, {}, model_name)
    for options in MODES:
        got = ranks[world].run(one_step, strategy_class, options, model_name)
        for (loss, gradients), (plain_loss, plain_gradients) in zip(got, expected, strict=True):
            assert loss == plain_loss and len(gradients) > 4, options
            assert all(map(torch.equal, gradients, plain_gradients)), options


@pytest.mark.parametrize("options", MODES, ids=name_of)
def test_so_it_is_in_bf16_with_split_layers(two_ranks, options):
    layouts = [{"mixed_precision": "bf16"}, {"tp_size": 2, "sequence_parallel": True}]
    for layout in layouts:
        expected = two_ranks.run(one_step, FSDP2, layout, "llama")
        for got, plain in zip(two_ranks.run(one_step, FSDP2, layout | options, "llama"), expected, strict=True):
            assert got[0] == plain[0]
            assert all(map(torch.equal, got[1], plain[1]))


def megatron_step(mode: Any) -> tuple[float, list[torch.Tensor]]:
    cuda_streams.install()
    return one_step(MegatronFSDP, {"activation_checkpointing": mode}, "llama")


@pytest.mark.parametrize("mode", ["selective", 2])
def test_megatron_fsdp_recomputes_too(two_ranks, mode):
    expected = two_ranks.run(megatron_step, False)
    for got, plain in zip(two_ranks.run(megatron_step, mode), expected, strict=True):
        assert got[0] == plain[0]
        assert all(map(torch.equal, got[1], plain[1]))


class Counting(TorchDispatchMode):
    """Counts the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def operations(options: dict[str, Any]) -> tuple[dict[str, int], int, int]:
    """Return how often each operation of a step ran, and how many activations and weights came to the host's hook."""
    model = DDP(**options).parallelize(tiny_llama().train(), dist_info=cpu_info(), mesh=None)
    ids, moved = torch.arange(8).reshape(1, 8), Counter()
    original = activations._to_host

    def noting(device: torch.device, tensor: torch.Tensor) -> Any:
        packed = original(device, tensor)
        moved[isinstance(packed, tuple)] += 1
        return packed

    activations._to_host = noting
    try:
        with Counting() as counting:
            model(input_ids=ids, use_cache=False).logits.sum().backward()
    finally:
        activations._to_host = original
    return dict(counting.calls), moved[True], moved[False]


def test_what_is_recomputed_and_what_goes_to_the_host(one_rank):
    def of(**options: Any) -> tuple[dict[str, int], int, int]:
        return one_rank.run(operations, options)[0]

    attention = "_scaled_dot_product_flash_attention_for_cpu"
    plain, *_ = of()
    full, *_ = of(activation_checkpointing="full")
    selective, *_ = of(activation_checkpointing="selective")
    second, *_ = of(activation_checkpointing=2)
    assert (plain["silu"], plain[attention]) == (2, 2)
    assert (full["silu"], full[attention], full["mm"]) == (4, 4, plain["mm"] + 2 * 6)  # none needs the last
    assert (selective["silu"], selective[attention], selective["mm"]) == (4, 2, plain["mm"])
    assert (second["silu"], second[attention], second["mm"]) == (3, 3, plain["mm"] + 6)
    _, moved, kept = of(activation_offload=True)
    assert moved > 2 * 20 and kept == 2 * 9  # seven matrices and two norms a layer stay on the device
    assert of(activation_offload=True, activation_checkpointing="full")[1:] == (2, 0)  # the layers' inputs


def test_attention_that_drops_out_is_recomputed_for_the_masks_after_it():
    from torch.utils.checkpoint import CheckpointPolicy

    attention = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert saved_or_recomputed(None, attention, 1, 2, 3, 0.0) == CheckpointPolicy.MUST_SAVE
    assert saved_or_recomputed(None, attention, 1, 2, 3, 0.1) == CheckpointPolicy.PREFER_RECOMPUTE
    assert saved_or_recomputed(None, torch.ops.aten.mm.default, 1, 2) == CheckpointPolicy.MUST_SAVE
    assert saved_or_recomputed(None, torch.ops.aten.silu.default, 1) == CheckpointPolicy.PREFER_RECOMPUTE


def test_a_model_that_cannot_recompute_is_an_error_of_the_user(one_rank):
    assert "need a model that supports them: Linear" in one_rank.run(refused)[0]


def refused() -> str:
    try:
        DDP(activation_checkpointing="full").parallelize(nn.Linear(1, 1), dist_info=cpu_info(), mesh=None)
    except UserError as error:
        return str(error)
    return ""
