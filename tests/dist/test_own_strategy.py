"""A strategy and handle of a user's own work like the shipped ones, without any change to the package."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from automodel.checkpoint.retention import Retention
from automodel.checkpoint.training import Checkpointer, TrainState, load_checkpoint
from automodel.data.batches.collate import CausalLMCollator
from automodel.data.batches.loader import TrainLoader
from automodel.data.prepare.prepared import Prompt
from automodel.distributed import clip_gradients, get_sync_ctx, rescale_gradients
from automodel.distributed.parallel.ddp import DDP
from automodel.distributed.parallel.fsdp2 import FSDP2
from automodel.distributed.parallel.handle import Handle, handle_of, register_handle, unwrap
from automodel.distributed.parallel.strategy import Strategy, build_mesh, data_parallel
from automodel.distributed.runtime.dist_info import DistInfo
from automodel.eval.generation import GenerationEvaluation
from automodel.hf_export.write import export_model
from automodel.losses.cross_entropy import CrossEntropy
from automodel.losses.objective import as_objective
from automodel.models.adapters import LoRA
from automodel.models.char_tokenizer import build_char_tokenizer
from automodel.optim.optimizers import adamw, parameter_groups
from automodel.tasks.causal_lm import CausalLM
from automodel.train.step import StepConfig, train_step, warm_up_buckets
from tests.dist.tiny import cpu_info, tiny_llama, uneven_rows

# float32 sums in another order, carried through four steps of AdamW.
RELATIVE = 1e-4


class Summed(nn.Module):
    """A wrapper whose backward leaves every rank its own gradients."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.notes = module, []

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.module(*args, **options)


@register_handle(Summed)
class SummedHandle(Handle):
    """Sums gradients over all ranks after the last micro-batch, and notes which methods are called."""

    generates_in_lockstep = True

    @contextmanager
    def sync_context(self, is_optim_step: bool, *, defer: bool) -> Iterator[None]:
        yield
        if is_optim_step:
            for parameter in self.model.parameters():
                dist.all_reduce(parameter.grad)

    def num_ranks_averaged(self, dp_size: int) -> int:
        return 1

    def groups(self) -> list[dist.ProcessGroup]:
        return [dist.group.WORLD]

    def needs_warm_up(self, dp_size: int) -> bool:
        return True

    def zero_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        self.wrapper.notes.append("zeroed")
        super().zero_gradients(optimizer)

    def reshard(self) -> None:
        self.wrapper.notes.append("resharded")

    def describe_shards(self, state: dict[str, Any]) -> None:
        self.wrapper.notes.append("described")

    def whole_weights(self, *, only_trained: bool) -> dict[str, torch.Tensor]:
        self.wrapper.notes.append("gathered")
        return super().whole_weights(only_trained=only_trained)

    @contextmanager
    def generating(self) -> Iterator[Any]:
        self.wrapper.notes.append("generating")
        yield self.plain_model
        self.wrapper.notes.append("generated")


class Own(Strategy):
    """A strategy that gives every rank the whole model."""

    name = "own"

    def build_mesh(self, dist_info: DistInfo) -> Any:
        return build_mesh(dist_info)

    def parallelize(self, model: nn.Module, *, dist_info: DistInfo, mesh: Any) -> nn.Module:
        return Summed(model)


def own_model() -> tuple[nn.Module, Any]:
    strategy = Own()
    mesh = strategy.build_mesh(cpu_info())
    return strategy.parallelize(tiny_llama(), dist_info=cpu_info(), mesh=mesh), data_parallel(mesh)


def loader(dp_rank: int, dp_size: int, local: int) -> TrainLoader:
    return TrainLoader(uneven_rows(32, masked=(1, 2)), collate=CausalLMCollator(0), global_batch_size=8,
                       local_batch_size=local, dp_rank=dp_rank, dp_size=dp_size, seed=0)  # fmt: skip


def trained(folder: str, *, is_own: bool, first: int = 0, last: int = 4) -> Any:
    """Train steps ``first`` to ``last``, resumed and saved; return losses, norms, weights by plain names, and notes."""
    model, dp = own_model() if is_own else (tiny_llama(), None)
    optimizer = adamw(parameter_groups(model), lr=1e-2)
    state = TrainState(model, optimizer)
    if first:
        load_checkpoint(Path(folder) / f"step_{first:08d}", state)
    config = StepConfig(torch.device("cpu"), dp.group if dp else dist.group.WORLD, True, 0.5, nullcontext)
    options = {"objective": as_objective(CrossEntropy()), "optimizer": optimizer, "config": config}
    rows = loader(dp.rank, dp.size, 2) if dp else loader(0, 1, 8)  # two micro-batches a step of two ranks, or one
    losses, norms = [], []
    for number, micro_batches in enumerate(list(rows.steps_of(0))[first:last]):
        if number == 0:
            warm_up_buckets(model, micro_batches[0], **options)
        result = train_step(model, micro_batches, **options)
        losses.append((result.loss_sum / result.num_label_tokens).item())
        norms.append(result.grad_norm.item())
    Checkpointer(Path(folder), retention=Retention()).save(state, progress={"step": last}, rng={})
    weights = {name: p.detach().clone() for name, p in unwrap(model).named_parameters()}
    return losses, norms, weights, model.notes if is_own else []


def train_own(folder: str, first: int, last: int) -> Any:
    return trained(folder, is_own=True, first=first, last=last)


def train_plain(folder: str, first: int, last: int) -> Any:
    return trained(folder, is_own=False, first=first, last=last)


def check(got: Any, expected: Any) -> None:
    assert got[0] == pytest.approx(expected[0], rel=RELATIVE)
    assert got[1] == pytest.approx(expected[1], rel=RELATIVE)
    assert got[2].keys() == expected[2].keys()
    for name, weight in expected[2].items():
        torch.testing.assert_close(got[2][name], weight, rtol=RELATIVE, atol=1e-5, msg=name)


def test_two_ranks_of_an_own_strategy_train_as_one_process(two_ranks, one_rank, tmp_path):
    (expected,) = one_rank.run(train_plain, str(tmp_path / "plain"), 0, 4)
    for got in two_ranks.run(train_own, str(tmp_path / "own"), 0, 4):
        check(got, expected)
        # One warm-up and four steps; a save.
        assert got[3] == ["zeroed"] * 5 + ["described"]


@pytest.mark.parametrize("then", ["own", "plain"])
def test_a_checkpoint_of_an_own_strategy_resumes_in_any_layout(two_ranks, one_rank, tmp_path, then):
    ((*whole,),) = one_rank.run(train_plain, str(tmp_path / "whole"), 0, 4)
    two_ranks.run(train_own, str(tmp_path / "parts"), 0, 2)
    pool, train = (two_ranks, train_own) if then == "own" else (one_rank, train_plain)
    for got in pool.run(train, str(tmp_path / "parts"), 2, 4):
        check(got, [whole[0][2:], whole[1][2:], whole[2]])


def exported_and_answered(folder: str) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
    model, dp = own_model()
    export_model(model, build_char_tokenizer(), folder=Path(folder))
    prompts = [Prompt(prompt_ids=[3 + i, 4], question=str(i), answer="x", kind=None) for i in range(3)]
    scores = GenerationEvaluation(batch_size=1, max_new_tokens=3, num_samples=3).run(
        model, build_char_tokenizer(), prompts=prompts, device=torch.device("cpu"), dp_group=dp.group
    )
    return dict(unwrap(model).named_parameters()), model.notes, [sample[2] for sample in scores.samples]


def test_export_and_generation_go_through_the_handle(two_ranks, tmp_path):
    from transformers import AutoModelForCausalLM

    for weights, notes, answers in two_ranks.run(exported_and_answered, str(tmp_path / "model")):
        assert notes == ["gathered", "resharded", "generating", "generated"] and len(answers) == 3
        loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model").named_parameters())
        assert weights.keys() == loaded.keys()
        assert all(torch.equal(loaded[name], weight) for name, weight in weights.items())


def rescaled() -> list[float]:
    model = Summed(nn.Linear(2, 1, bias=False))
    rank = dist.get_rank()
    with get_sync_ctx(model, True):
        model(torch.full((1, 2), 1.0 + rank)).sum().backward()
    rescale_gradients(model, torch.tensor(1 + 2 * rank))
    clip_gradients(model, None)
    return model.module.weight.grad.tolist()[0]


def test_the_documented_functions_ask_the_own_handle(two_ranks):
    # the sum of 1 and 2 over 1 + 3 tokens
    assert two_ranks.run(rescaled) == [[0.75, 0.75]] * 2


def found(kind: str) -> tuple[str, str, str]:
    model: nn.Module = tiny_llama()
    if "peft" in kind:
        model = LoRA(rank=2).apply(model, task=CausalLM())
    if "ddp" in kind:
        model = DDP().parallelize(model, dist_info=cpu_info(), mesh=None)
    if "fsdp2" in kind:
        model = FSDP2().parallelize(model, dist_info=cpu_info(), mesh=build_mesh(cpu_info()))
    if "own" in kind:
        model = Summed(model)
    if "compile" in kind:
        model = torch.compile(model)
    handle = handle_of(model)
    return type(handle).__name__, type(handle.plain_model).__name__, handle.plain_class.__name__


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("plain", ("PlainHandle", "LlamaForCausalLM", "LlamaForCausalLM")),
        ("compile", ("PlainHandle", "LlamaForCausalLM", "LlamaForCausalLM")),
        ("compile ddp", ("DDPHandle", "LlamaForCausalLM", "LlamaForCausalLM")),
        ("ddp peft", ("DDPHandle", "PeftModelForCausalLM", "PeftModelForCausalLM")),
        ("compile fsdp2", ("FSDP2Handle", "FSDPLlamaForCausalLM", "LlamaForCausalLM")),
        ("compile own peft", ("SummedHandle", "PeftModelForCausalLM", "PeftModelForCausalLM")),
        ("own ddp", ("SummedHandle", "DistributedDataParallel", "DistributedDataParallel")),  # the outermost decides
    ],
)
def test_the_handle_is_found_inside_other_wrappers(two_ranks, kind, names):
    assert two_ranks.run(found, kind) == [names] * 2


def test_a_wrapper_that_inherits_has_its_own_handle_or_that_of_its_base():
    class Inherits(Summed):
        pass

    assert type(handle_of(Inherits(nn.Linear(1, 1)))) is SummedHandle

    @register_handle(Inherits)
    class InheritsHandle(SummedHandle):
        pass

    assert type(handle_of(Inherits(nn.Linear(1, 1)))) is InheritsHandle
    assert type(handle_of(Summed(nn.Linear(1, 1)))) is SummedHandle


def test_a_wrapper_named_like_an_unknown_one_is_known_once_registered(monkeypatch):
    class OptionalFSDP(nn.Module):
        pass

    with pytest.raises(TypeError, match="OptionalFSDP is a distributed wrapper that is not known here"):
        handle_of(nn.Sequential(OptionalFSDP()))

    @register_handle("optional_package.OptionalFSDP")  # found once the package is imported
    class OptionalHandle(Handle):
        pass

    with pytest.raises(TypeError):
        handle_of(OptionalFSDP())
    package = ModuleType("optional_package")
    package.OptionalFSDP = OptionalFSDP
    monkeypatch.setitem(sys.modules, "optional_package", package)
    assert type(handle_of(nn.Sequential(OptionalFSDP()))) is OptionalHandle
