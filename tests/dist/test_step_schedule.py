"""What happens once a step: one reduction of gradients, in float32, and one move of the schedule."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import nn

from automodel.data.batches.batch import Batch
from automodel.data.batches.collate import CausalLMCollator
from automodel.data.batches.loader import TrainLoader
from automodel.data.prepare.prepared import Prompt
from automodel.distributed.parallel.ddp import DDP
from automodel.distributed.parallel.fsdp2 import FSDP2
from automodel.eval.generation import GenerationEvaluation
from automodel.losses.cross_entropy import CrossEntropy
from automodel.losses.objective import as_objective
from automodel.models.char_tokenizer import build_char_tokenizer
from automodel.optim.schedules import constant
from automodel.train.flops import TrainingFlops
from automodel.train.loop import Evaluator, Timeouts, TrainLoop
from automodel.train.meter import Meter
from automodel.train.step import StepConfig, train_step, warm_up_buckets
from automodel.train.step_scheduler import StepScheduler
from tests.dist.tiny import cpu_info, full, parallel_model, tiny_llama, uneven_rows


def micro_batches(num: int) -> list[dict[str, torch.Tensor]]:
    return [CausalLMCollator(0)([row]) for row in uneven_rows(num)]


def step_config(dp_group: Any = None, *, defer: bool = True, autocast: Any = nullcontext) -> StepConfig:
    return StepConfig(torch.device("cpu"), dp_group or dist.group.WORLD, defer, 1.0, autocast)


def collectives_of_a_step(strategy: str, num_micro_batches: int, defer: bool) -> Counter[str]:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        calls: ClassVar[Counter[str]] = Counter()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            is_of_gradients = max((t.numel() for t in flatten(args)), default=0) > 100  # not a loss, count or norm
            if function.namespace == "c10d" and is_of_gradients:
                self.calls[str(function).split(".")[1]] += 1
            return function(*args, **(kwargs or {}))

    model, _, dp = parallel_model(strategy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {
        "objective": as_objective(CrossEntropy()),
        "optimizer": optimizer,
        "config": step_config(dp.group, defer=defer),
    }
    train_step(model, micro_batches(1), **options)  # after which DDP has put its buckets in order
    Counting.calls = Counter()
    with Counting():
        train_step(model, micro_batches(num_micro_batches), **options)
    return Counting.calls


def flatten(args: Any) -> list[torch.Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(
    ("world", "strategy", "defer", "reduce_scatters", "all_reduces"),
    [
        (2, "ddp", True, 0, 1),
        (2, "ddp", False, 0, 1),
        (2, "fsdp2", True, 3, 0),  # three units: two layers and the rest
        (2, "fsdp2", False, 9, 0),
        (4, "hsdp", True, 3, 3),
        (4, "hsdp", False, 9, 3),
    ],
)
def test_a_step_of_three_micro_batches_reduces_gradients_as_configured(
    ranks, world, strategy, defer, reduce_scatters, all_reduces
):
    for calls in ranks[world].run(collectives_of_a_step, strategy, 3, defer):
        assert calls["_reduce_scatter_base_"] == reduce_scatters, calls
        assert calls["allreduce_"] == all_reduces, calls


class Scaling(nn.Module):
    """One weight, whose gradient is the sum of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(1, 1, bias=False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


def gradient_of_inputs(strategy: DDP | FSDP2, inputs: list[list[float]], defer: bool) -> float:
    model = strategy.parallelize(Scaling(), dist_info=cpu_info(), mesh=strategy.build_mesh(cpu_info()))

    class Keeping(torch.optim.Optimizer):
        def step(self) -> None:
            self.kept = full(model_weight.grad).item()
            assert model_weight.grad.dtype == torch.float32

    (model_weight,) = model.parameters()
    optimizer = Keeping([model_weight], {})
    batches = [
        Batch({"x": torch.tensor([[x]]), "attention_mask": torch.ones(1, 1)}, torch.zeros(1, dtype=torch.long))
        for x in inputs[dist.get_rank()]
    ]
    config = StepConfig(torch.device("cpu"), dist.group.WORLD, defer, None,
                        lambda: strategy.autocast(torch.device("cpu")))  # fmt: skip
    objective = as_objective(lambda model, batch: model(batch["x"]).sum())
    train_step(model, batches, objective=objective, optimizer=optimizer, config=config)
    return optimizer.kept * sum(map(len, inputs))


# bf16 has 8 bits: between 256 and 512 it knows even numbers alone, and 256 + 1 + 256 + 1 + 1 would come to 512.
@pytest.mark.parametrize("defer", [True, False])
@pytest.mark.parametrize("strategy", [DDP(mixed_precision="bf16"), FSDP2(mixed_precision="bf16")], ids=["ddp", "fsdp2"])
def test_gradients_of_a_bf16_forward_are_summed_in_float32(two_ranks, strategy, defer):
    inputs = [[256.0, 1.0], [256.0, 1.0]]
    assert two_ranks.run(gradient_of_inputs, strategy, inputs, defer) == [514.0, 514.0]
    inputs = [[256.0, 256.0], [1.0, 0.0]]
    assert two_ranks.run(gradient_of_inputs, strategy, inputs, defer) == [513.0, 513.0]


def left_by_settling() -> tuple[bool, bool, bool]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=48, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, attention_dropout=0.5)  # fmt: skip
    torch.manual_seed(dist.get_rank())
    model = DDP().parallelize(LlamaForCausalLM(config).train(), dist_info=cpu_info(), mesh=None)
    weights = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    (batch,) = micro_batches(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    warm_up_buckets(model, batch, objective=as_objective(CrossEntropy()), optimizer=optimizer, config=step_config())
    return (
        all(torch.equal(p, before) for p, before in zip(model.parameters(), weights, strict=True)),
        all(p.grad is None for p in model.parameters()),
        torch.equal(torch.get_rng_state(), state),
    )


def test_settling_the_buckets_leaves_weights_gradients_and_random_state(four_ranks):
    assert four_ranks.run(left_by_settling) == [(True, True, True)] * 4


def gradients_of_a_step(is_first: bool, is_warmed_up: bool) -> list[torch.Tensor]:
    """Return what the optimizer of the first or second step is given, of weights that never change."""

    class Keeping(torch.optim.Optimizer):
        def step(self) -> None:
            self.kept = [p.grad.clone() for p in self.param_groups[0]["params"]]

    model = DDP().parallelize(tiny_llama(), dist_info=cpu_info(), mesh=None)
    optimizer = Keeping(model.parameters(), {})
    batches = [CausalLMCollator(0)(uneven_rows(4)[dist.get_rank() :]) for _ in range(2)]
    options = {"objective": as_objective(CrossEntropy()), "optimizer": optimizer, "config": step_config()}
    if is_warmed_up:
        warm_up_buckets(model, batches[0], **options)
    for batch in batches[: 1 if is_first else 2]:
        train_step(model, [batch], **options)
    return optimizer.kept


def test_the_first_step_of_ddp_sums_in_the_order_of_all_later_ones(four_ranks):
    second = four_ranks.run(gradients_of_a_step, False, False)[0]
    for is_warmed_up in (True, False):
        first = four_ranks.run(gradients_of_a_step, True, is_warmed_up)[0]
        assert all(map(torch.equal, first, second)) == is_warmed_up


def answers_in_train_mode(dropout: float) -> tuple[list[str], bool]:
    model = tiny_llama().train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    prompts = [Prompt(prompt_ids=[3 + i, 4, 5 + i], question=str(i), answer="x", kind=None) for i in range(4)]
    scores = GenerationEvaluation(batch_size=2, max_new_tokens=8, num_samples=4).run(
        model, build_char_tokenizer(), prompts=prompts, device=torch.device("cpu"),
        dp_group=dist.group.WORLD,
    )  # fmt: skip
    return [sample[2] for sample in scores.samples], all(module.training for module in model.modules())


def test_answers_are_generated_without_dropout_and_training_continues_with_it(one_rank):
    ((expected, _),) = one_rank.run(answers_in_train_mode, 0.0)
    ((got, is_training),) = one_rank.run(answers_in_train_mode, 0.9)
    assert got == expected and len(got) == 4 and is_training


class NotFiniteAt(CrossEntropy):
    """Is not a number in one of the micro-batches."""

    def __init__(self, call: int) -> None:
        object.__setattr__(self, "calls", iter(range(1, 100)))
        object.__setattr__(self, "call", call)

    def __call__(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss_sum = super().__call__(model, batch)
        return loss_sum * (float("nan") if next(self.calls) == self.call else 1.0)


def rates_of_a_run(not_finite_at: int, folder: str) -> tuple[list[float], list[float], list[float]]:
    """Return the rates that were logged, those of the updates, and the sizes of the updates."""
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    used, updates, records = [], [], []
    weight = model.model.norm.weight
    before = [weight.detach().clone()]

    def note(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        used.append(optimizer.param_groups[0]["lr"])
        updates.append(((weight.detach() - before[-1]).norm() / weight.grad.norm()).item())
        before.append(weight.detach().clone())

    optimizer.register_step_post_hook(note)
    loader = TrainLoader(uneven_rows(12), collate=CausalLMCollator(0), global_batch_size=2, local_batch_size=1,
                         dp_rank=0, dp_size=1, seed=0)  # fmt: skip
    TrainLoop(
        model=model,
        objective=as_objective(NotFiniteAt(not_finite_at)),
        optimizer=optimizer,
        lr_scheduler=constant(optimizer, 6, warmup_steps=6),
        steps=StepScheduler(6, num_epochs=1, val_every_steps=2),
        loader=loader,
        step_config=step_config(),
        evaluators=[Evaluator("validation", lambda poll: {"loss": 1.0})],
        checkpointer=None,
        sink=SimpleNamespace(log=records.append),
        meter=Meter(torch.device("cpu"), world_size=1, flops=TrainingFlops()),
        timeouts=Timeouts(training=1, slow_phase=1),
        metrics_size=lambda: 0,
        resume_facts={},
        on_non_finite="skip",
        dump_folder=Path(folder),
    ).run()
    return [record["lr"] for record in records if record["kind"] == "train"], used, updates


def test_the_schedule_moves_once_a_step_and_the_logged_rate_is_that_of_the_update(one_rank, tmp_path):
    ((logged, used, updates),) = one_rank.run(rates_of_a_run, 0, str(tmp_path))
    expected = [k / 6 for k in range(1, 7)]  # two micro-batches a step, validations between them
    assert logged == pytest.approx(expected)
    assert used == pytest.approx(expected)
    assert updates == pytest.approx(expected, rel=1e-4)  # the update of plain SGD is its rate times the gradient


def test_a_skipped_step_keeps_its_place_in_the_schedule(one_rank, tmp_path):
    ((logged, used, _),) = one_rank.run(rates_of_a_run, 5, str(tmp_path))  # the first micro-batch of the third step
    assert logged == pytest.approx([k / 6 for k in range(1, 7)])
    assert used == pytest.approx([k / 6 for k in (1, 2, 4, 5, 6)])
