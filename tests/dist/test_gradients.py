"""The documented functions on gradients and losses."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from automodel.distributed import clip_gradients, get_sync_ctx, reduce_loss, rescale_gradients
from tests.dist.tiny import parallel_model


def with_gradient(*values: float, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(len(values), dtype=dtype))
    model.weight.grad = torch.tensor(values, dtype=dtype)
    return model


def rescaled(counts: list[int]) -> list[float]:
    model = with_gradient(6.0, 12.0)
    rescale_gradients(model, torch.tensor(counts[dist.get_rank()]), dist.group.WORLD)
    return model.weight.grad.tolist()


def test_rescale_sums_the_counts_and_undoes_the_average(two_ranks):
    for grad in two_ranks.run(rescaled, [1, 5]):
        assert grad == [6.0 * 2 / 6, 12.0 * 2 / 6]


def test_rescale_with_no_tokens_leaves_zeros_and_no_nan(two_ranks):
    for grad in two_ranks.run(rescaled, [0, 0]):
        assert grad == [0.0, 0.0]


def test_rescale_counts_beyond_32_bits(two_ranks):
    for grad in two_ranks.run(rescaled, [2**30, 2**31]):
        assert grad[0] == pytest.approx(6.0 * 2 / (2**30 + 2**31))


def test_rescale_without_a_group_divides_by_the_own_count():
    model = with_gradient(6.0)
    rescale_gradients(model, torch.tensor(3))
    assert model.weight.grad.tolist() == [2.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clip_returns_the_norm_and_scales_to_the_limit(dtype):
    model = with_gradient(3.0, 4.0, dtype=dtype)
    norm = clip_gradients(model, 1.0)
    assert norm.shape == () and norm.item() == pytest.approx(5.0)
    assert model.weight.grad.float().tolist() == pytest.approx([0.6, 0.8], rel=1e-2)


def test_the_norm_takes_gradients_of_several_types():
    model = nn.Module()
    for number, dtype in enumerate([torch.float32, torch.bfloat16, torch.float32, torch.float16]):
        parameter = nn.Parameter(torch.zeros(3, dtype=dtype))
        parameter.grad = torch.tensor([1.0, 2.0, 3.0 + number], dtype=dtype)
        model.register_parameter(f"weight_{number}", parameter)
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    everything = torch.cat([p.grad.double() for p in model.parameters() if p.grad is not None])
    for norm_type in (1.0, 2.0, float("inf")):
        norm = clip_gradients(model, None, norm_type=norm_type)
        assert norm.dtype == torch.float32 and norm.item() == pytest.approx(everything.norm(norm_type).item())


def num_operations_of_a_norm(num_parameters: int) -> int:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        num = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Counting.num += 1
            return function(*args, **(kwargs or {}))

    model = nn.ParameterList([nn.Parameter(torch.zeros(2)) for _ in range(num_parameters)])
    for parameter in model:
        parameter.grad = torch.ones(2)
    with Counting():
        clip_gradients(model, None)
    return Counting.num


def test_the_norm_is_launched_for_all_gradients_at_once():
    assert num_operations_of_a_norm(40) == num_operations_of_a_norm(4)


def test_clip_with_none_only_measures():
    model = with_gradient(3.0, 4.0)
    assert clip_gradients(model, None).item() == 5.0
    assert model.weight.grad.tolist() == [3.0, 4.0]


def reduced(per_token: bool) -> tuple[float, int]:
    rank = dist.get_rank()
    losses = [torch.tensor(2.0)] * rank  # the store of rank 0 is empty
    loss_sum, denominator = reduce_loss(losses, torch.tensor(10 + rank), per_token, dist.group.WORLD)
    assert denominator.dtype == torch.int64
    return loss_sum.item(), denominator.item()


def test_reduce_loss_sums_over_ranks_with_an_empty_store(two_ranks):
    assert two_ranks.run(reduced, True) == [(2.0, 21)] * 2
    assert two_ranks.run(reduced, False) == [(2.0, 1)] * 2


def collectives(strategy: str, num_micro_batches: int, defer: bool) -> dict[str, int]:
    from collections import Counter

    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls = Counter()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "c10d":
                self.calls[str(function).split(".")[1]] += 1
            return function(*args, **(kwargs or {}))

    model, _, _ = parallel_model(strategy)
    ids = torch.arange(8).reshape(1, 8)
    with Counting() as counting:
        for index in range(num_micro_batches):
            with get_sync_ctx(model, index == num_micro_batches - 1, defer):
                model(input_ids=ids, use_cache=False).logits.sum().backward()
    return dict(counting.calls)


# 3 units: two layers and the root. HSDP all-reduces once a unit, on the last micro-batch alone.
@pytest.mark.parametrize(
    ("world", "strategy", "defer", "reduce_scatters", "all_reduces"),
    [
        (2, "fsdp2", True, 3, 0),
        (2, "fsdp2", False, 12, 0),
        (4, "hsdp", True, 3, 3),
        (4, "hsdp", False, 12, 3),
    ],
)
def test_number_of_collectives_a_step(ranks, world, strategy, defer, reduce_scatters, all_reduces):
    for calls in ranks[world].run(collectives, strategy, 4, defer):
        assert calls.get("_reduce_scatter_base_", 0) == reduce_scatters
        assert calls.get("allreduce_", 0) == all_reduces


@pytest.mark.parametrize("defer", [True, False])
def test_ddp_reduces_once_a_step_whatever_defer_says(two_ranks, defer):
    once = two_ranks.run(collectives, "ddp", 1, True)[0]
    for calls in two_ranks.run(collectives, "ddp", 4, defer):
        assert calls.get("allreduce_", 0) <= once.get("allreduce_", 0) + 1  # DDP rebuilds its buckets once


def sync_state_after_failure() -> list[bool]:
    from torch.distributed.fsdp import FSDPModule

    model, _, _ = parallel_model("fsdp2")
    try:
        with get_sync_ctx(model, False, True):
            raise KeyError("a failing forward")
    except KeyError:
        pass
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return [unit._get_fsdp_state()._fsdp_param_group.reduce_grads for unit in units]


def test_the_sync_setting_is_put_back_after_an_exception(two_ranks):
    for states in two_ranks.run(sync_state_after_failure):
        assert len(states) == 3 and all(states)


def test_an_unknown_wrapper_raises():
    class SomebodysFSDP(nn.Module):
        pass

    with pytest.raises(TypeError, match="SomebodysFSDP"):
        get_sync_ctx(SomebodysFSDP(), True)


def test_a_plain_module_needs_no_context():
    with get_sync_ctx(nn.Linear(1, 1), False):
        pass
