"""What the strategies promise beyond the numbers of a step."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from automodel.distributed import clip_gradients, dp_eval_sample_shard, get_sync_ctx, rescale_gradients
from automodel.distributed.parallel.ddp import DDP
from automodel.distributed.parallel.fsdp2 import FSDP2
from automodel.distributed.parallel.gradients import total_grad_norm
from automodel.distributed.parallel.handle import handle_of
from automodel.distributed.parallel.megatron_fsdp import MegatronFSDP
from automodel.distributed.parallel.strategy import data_parallel
from automodel.distributed.parallel.tensor_parallel import apply_tensor_parallel
from automodel.distributed.runtime.agreement import set_collective_timeout
from automodel.distributed.runtime.side_group import _create_gloo_group
from automodel.models.adapters import LoRA
from automodel.tasks.causal_lm import CausalLM
from automodel.types import UserError
from tests.dist.pool import RankPool
from tests.dist.tiny import STRATEGIES, cpu_info, full, parallel_model, tiny_llama


def counted(strategy: str, num_micro_batches: int, defer: bool) -> dict[str, int]:
    """Count the collectives of a step whose weights were gathered before, by what torch calls them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: Counter[str] = Counter()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "c10d":
                name = str(function).split(".")[1].strip("_").replace("_tensor_coalesced", "").replace("_base", "")
                self.calls[name.replace("allgather_into", "allgather")] += 1
            return function(*args, **(kwargs or {}))

    model, _, _ = parallel_model(strategy)
    with Counting() as counting:
        for index in range(num_micro_batches):
            with get_sync_ctx(model, index == num_micro_batches - 1, defer):
                model(input_ids=torch.arange(8).reshape(1, 8), use_cache=False).logits.sum().backward()
    return dict(counting.calls)


# Three buckets: two layers and the rest. Four micro-batches.
@pytest.mark.parametrize(
    ("world", "strategy", "reduce_scatters", "all_reduces"),
    [(2, "zero1", 3, 0), (2, "zero2", 12, 0), (2, "zero3", 12, 0), (4, "zero1 x 2", 3, 3), (4, "zero3 x 2", 12, 3)],
)
@pytest.mark.parametrize("defer", [True, False])
def test_megatron_fsdp_reduces_as_its_stage_allows(ranks, world, strategy, reduce_scatters, all_reduces, defer):
    for calls in ranks[world].run(counted, strategy, 4, defer):
        assert calls.get("reduce_scatter", 0) == reduce_scatters, calls
        assert sum(count for name, count in calls.items() if "allreduce" in name) == all_reduces, calls


@pytest.mark.parametrize("kind", ["compile", "peft", "peft around"])
def test_no_sync_reaches_ddp_behind_other_wrappers(two_ranks, kind):
    assert all(two_ranks.run(is_unsynced, kind))


def is_unsynced(kind: str) -> bool:
    """Return whether DDP is told not to synchronise, seen on its own flag."""
    model = tiny_llama()
    if kind == "peft":
        model = LoRA(rank=2).apply(model, task=CausalLM())
    ddp = DistributedDataParallel(model)
    outer: nn.Module = torch.compile(ddp) if kind == "compile" else ddp
    if kind == "peft around":
        outer = nn.Sequential(ddp)
    with get_sync_ctx(outer, False):
        is_off = not ddp.require_backward_grad_sync
    return is_off and ddp.require_backward_grad_sync


def unused() -> str:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.left_out = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = DDP().parallelize(Half(), dist_info=cpu_info(), mesh=None)
    try:
        with get_sync_ctx(model, True):
            model(torch.ones(1, 2)).sum().backward()
    except UserError as error:
        return str(error)
    return ""


def test_ddp_tells_trained_parameters_that_the_loss_does_not_reach(two_ranks):
    for told in two_ranks.run(unused):
        assert "2 trained parameters take no part in the loss, such as left_out.weight" in told


def drift() -> torch.Tensor:
    rank = dist.get_rank()
    model = DistributedDataParallel(nn.Linear(2, 1, bias=False))
    model(torch.full((1, 2), 1.0 + rank)).sum().backward()
    rescale_gradients(model, torch.tensor(1 + 2 * rank))  # no group is named
    return model.module.weight.grad.clone()


def test_replicas_do_not_drift_apart_where_no_group_is_named(two_ranks):
    first, second = two_ranks.run(drift)
    # the sum of 1 and 2 over 1 + 3 tokens, the same on both
    assert first.tolist() == second.tolist() == [[0.75, 0.75]]


def rescaled_without_group(strategy: str) -> list[float]:
    model, _, _ = parallel_model(strategy)
    with get_sync_ctx(model, True):
        model(input_ids=torch.arange(8).reshape(1, 8), use_cache=False).logits.square().sum().backward()
    rescale_gradients(model, torch.tensor(1 + dist.get_rank()))
    return clip_gradients(model, None).item()


@pytest.mark.parametrize(("world", "strategy"), [(2, "ddp"), (2, "fsdp2"), (4, "hsdp"), (2, "zero1"), (4, "zero3 x 2")])
def test_rescaling_finds_the_ranks_of_every_wrapper(ranks, world, strategy):
    (plain,) = ranks[1].run(rescaled_without_group, "ddp")
    # every rank has the same rows: their sum over sum(1..world) tokens
    for norm in ranks[world].run(rescaled_without_group, strategy):
        assert norm == pytest.approx(plain * world / sum(range(1, world + 1)), rel=1e-5)


def norms_of(strategy: str, norm_type: float) -> tuple[float, float, int]:
    model, _, _ = parallel_model(strategy)
    with get_sync_ctx(model, True):
        model(input_ids=torch.arange(8).reshape(1, 8), use_cache=False).logits.square().sum().backward()
    norm = total_grad_norm(list(model.parameters()), norm_type=norm_type)
    return (
        norm.item(),
        torch.cat([full(p.grad).flatten() for p in model.parameters()]).double().norm(norm_type).item(),
        norm.ndim,
    )


@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize(("world", "strategy"), [(1, "ddp"), (2, "fsdp2"), (4, "hsdp"), (2, "tp2"), (4, "hsdp x tp2")])
def test_the_norm_is_that_of_the_whole_gradient(ranks, world, strategy, norm_type):
    for norm, expected, ndim in ranks[world].run(norms_of, strategy, norm_type):
        assert norm == pytest.approx(expected, rel=1e-5) and ndim == 0


def clipped_to(norm_type: float) -> float:
    model, _, _ = parallel_model("fsdp2")
    with get_sync_ctx(model, True):
        model(input_ids=torch.arange(8).reshape(1, 8), use_cache=False).logits.square().sum().backward()
    clip_gradients(model, 0.5, norm_type=norm_type)
    return total_grad_norm(list(model.parameters()), norm_type=norm_type).item()


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_holds_for_other_norms(two_ranks, norm_type):
    assert two_ranks.run(clipped_to, norm_type) == pytest.approx([0.5, 0.5], rel=1e-4)


def timeouts(strategy: str) -> tuple[set[float], set[float]]:
    parallel_model(strategy)
    side = _create_gloo_group(timedelta(minutes=7))
    before = set(dist.distributed_c10d._world.pg_names)
    set_collective_timeout(3)
    own = side._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    found = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in before - {side}}
    dist.destroy_process_group(side)
    set_collective_timeout(2)  # as the tests' ranks began
    return found, {own}


@pytest.mark.parametrize("strategy", ["hsdp", "tp2", "hsdp x tp2"])
def test_every_group_of_a_mesh_has_the_configured_time_out_and_those_beside_it_their_own(four_ranks, strategy):
    assert four_ranks.run(timeouts, strategy) == [({180.0}, {420.0})] * 4


def groups_made(strategy: str) -> list[int]:
    before = set(dist.distributed_c10d._world.pg_names)
    mesh = STRATEGIES[strategy].build_mesh(cpu_info())
    data_parallel(mesh)
    made = set(dist.distributed_c10d._world.pg_names) - before
    assert [mesh.get_group(axis).size() for axis in mesh.mesh_dim_names] == list(mesh.shape)
    return sorted(len(dist.get_process_group_ranks(group)) for group in made)


@pytest.mark.parametrize(
    ("strategy", "sizes"),
    [("ddp", [1]), ("fsdp2", [1]), ("hsdp", [1, 2, 2]), ("tp2", [1, 2, 2]), ("hsdp x tp2", [1, 2, 2, 2])],
)
def test_a_mesh_makes_no_second_group_of_the_same_ranks(four_ranks, strategy, sizes):
    # An axis of all ranks is the main group; one group stands for every axis of a single rank.
    assert four_ranks.run(groups_made, strategy) == [sizes] * 4


def heads(num_kv_heads: int, model_type: str) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                  num_attention_heads=4, num_key_value_heads=num_kv_heads)  # fmt: skip
    mesh = FSDP2(tp_size=2).build_mesh(cpu_info())
    try:
        apply_tensor_parallel(AutoModelForCausalLM.from_config(config), mesh["tp"], sequence_parallel=False)
    except UserError as error:
        return str(error)
    return ""


def test_what_tensor_parallel_cannot_do_is_told(two_ranks):
    assert "does not divide the model's num_key_value_heads, 1" in two_ranks.run(heads, 1, "llama")[0]
    assert "has no tensor-parallel plan" in two_ranks.run(heads, 4, "opt")[0]


def logits(model_type: str, length: int, is_parallel: bool, sequence_parallel: bool) -> torch.Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, vocab_size=49, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                  num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                                  pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    if is_parallel:
        strategy = FSDP2(tp_size=2, sequence_parallel=sequence_parallel)
        model = strategy.parallelize(model, dist_info=cpu_info(), mesh=strategy.build_mesh(cpu_info()))
    with torch.no_grad():
        return model(input_ids=torch.arange(length).reshape(1, length) % 49, use_cache=False).logits


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("length", [7, 8])  # with 7, the two ranks cannot split the sequence evenly
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3", "gemma2"])
def test_the_plans_of_several_families_give_the_same_logits(two_ranks, one_rank, model_type, length, sequence_parallel):
    (expected,) = one_rank.run(logits, model_type, length, False, False)
    for got in two_ranks.run(logits, model_type, length, True, sequence_parallel):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_who_evaluates_on_its_own():
    assert dp_eval_sample_shard(DDP(), 1, 4) == (1, 4)
    assert dp_eval_sample_shard(DDP(), 0, 1) is None
    assert dp_eval_sample_shard(FSDP2(), 1, 4) is None
    assert dp_eval_sample_shard(MegatronFSDP(), 1, 4) is None


def test_megatron_fsdp_says_that_it_needs_cuda():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    pool = RankPool(1)  # of its own: the stand-in for CUDA's streams stays in a process
    assert "needs a CUDA device" in pool.run(without_cuda)[0]
    pool.close()


def without_cuda() -> str:
    try:
        MegatronFSDP().build_mesh(cpu_info())
    except UserError as error:
        return str(error)
    return ""


def test_prefetching_further_layers_changes_no_number(two_ranks):
    assert two_ranks.run(prefetched, 1)[0] == two_ranks.run(prefetched, 2)[0]


def prefetched(num_layers: int) -> float:
    strategy = FSDP2(num_prefetched_layers=num_layers)
    model = strategy.parallelize(tiny_llama(), dist_info=cpu_info(), mesh=strategy.build_mesh(cpu_info()))
    model(input_ids=torch.arange(8).reshape(1, 8), use_cache=False).logits.square().sum().backward()
    return total_grad_norm(list(model.parameters())).item()


@pytest.mark.parametrize("strategy", ["fsdp2", "hsdp"])
def test_parameters_are_sharded_again_after_a_forward_without_a_backward(four_ranks, strategy):
    assert four_ranks.run(sharded_before_and_after_reshard, strategy) == [(False, True)] * 4


def sharded_before_and_after_reshard(strategy: str) -> tuple[bool, bool]:
    model, _, _ = parallel_model(strategy)
    with torch.no_grad():
        model(input_ids=torch.arange(8).reshape(1, 8), use_cache=False)
    before = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    handle_of(model).reshard()
    return before, all(isinstance(parameter, DTensor) for parameter in model.parameters())
