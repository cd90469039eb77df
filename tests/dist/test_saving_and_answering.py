"""Saving, going on, exporting and answering under every strategy, MegatronFSDP above all."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from automodel.checkpoint.retention import Retention
from automodel.checkpoint.training import Checkpointer, TrainState, load_checkpoint
from automodel.checkpoint.weight_reader import WeightReader
from automodel.data.batches.collate import CausalLMCollator
from automodel.data.batches.loader import TrainLoader
from automodel.distributed.runtime.dist_info import get_store
from automodel.eval.generation import GenerationEvaluation
from automodel.hf_export.write import export_model
from automodel.losses.cross_entropy import CrossEntropy
from automodel.losses.objective import as_objective
from automodel.models.char_tokenizer import build_char_tokenizer
from automodel.optim.optimizers import adamw, parameter_groups
from automodel.train.step import StepConfig, train_step
from tests.dist.tiny import clean_name, full, parallel_model, uneven_rows


def steps(strategy: str, folder: str, *, first: int, last: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train steps ``first`` to ``last``, from the checkpoint before the first where there is one, and save."""
    model, layout, dp = parallel_model(strategy)
    optimizer = adamw(parameter_groups(model), lr=1e-2)
    layout.prepare_optimizer(optimizer, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    state = TrainState(model, optimizer)
    if first:
        progress, _ = load_checkpoint(Path(folder) / f"step_{first:08d}", state)
        assert progress["step"] == first
        for _ in range(first):
            schedule.step()
    loader = TrainLoader(uneven_rows(48), collate=CausalLMCollator(0), global_batch_size=8, local_batch_size=2,
                         dp_rank=dp.rank, dp_size=dp.size, seed=0)  # fmt: skip
    config = StepConfig(torch.device("cpu"), dp.group, True, 1.0, nullcontext)
    losses = []
    for micro_batches in list(loader.steps_of(0))[first:last]:
        result = train_step(
            model, micro_batches, objective=as_objective(CrossEntropy()), optimizer=optimizer, config=config
        )
        schedule.step()
        losses.append((result.loss_sum / result.num_label_tokens).item())
    weights = {clean_name(name): full(p).detach().clone() for name, p in model.named_parameters()}
    Checkpointer(Path(folder), retention=Retention()).save(state, progress={"step": last}, rng={})
    return losses, weights


@pytest.mark.parametrize(("strategy", "then"), [("zero3", "zero3"), ("zero1", "zero3"), ("zero3", "fsdp2"),
                                                ("ddp", "zero2")])  # fmt: skip
def test_it_goes_on_in_its_own_and_in_another_layout(two_ranks, tmp_path, strategy, then):
    ((losses, weights), _) = two_ranks.run(steps_of, strategy, str(tmp_path / "whole"), 0, 6)
    two_ranks.run(steps_of, strategy, str(tmp_path / "parts"), 0, 3)
    ((rest, got), _) = two_ranks.run(steps_of, then, str(tmp_path / "parts"), 3, 6)
    assert rest == pytest.approx(losses[3:], rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-4, atol=1e-6)


def options_after_loading(folder: str) -> list[dict[str, Any]]:
    for lr, options in ((1e-2, {}), (1e-3, {"betas": (0.5, 0.6), "eps": 1e-6, "weight_decay": 0.3})):
        model, _, _ = parallel_model("ddp")
        optimizer = adamw(parameter_groups(model), lr=lr, **options)
        if not options:
            Checkpointer(Path(folder), retention=Retention()).save(
                TrainState(model, optimizer), progress={"step": 1}, rng={}
            )
    load_checkpoint(Path(folder) / "step_00000001", TrainState(model, optimizer))
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def test_the_optimizer_keeps_the_options_that_it_was_built_with(two_ranks, tmp_path):
    groups, _ = two_ranks.run(options_after_loading, str(tmp_path))
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    assert all(group["weight_decay"] == 0.3 for group in groups if group.get("is_hidden"))
    for group in groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.5, 0.6), 1e-6)


def steps_of(strategy: str, folder: str, first: int, last: int) -> Any:
    return steps(strategy, folder, first=first, last=last)


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_its_weights_are_read_from_a_checkpoint_without_the_ranks(two_ranks, tmp_path, strategy):
    ((_, weights), _) = two_ranks.run(steps_of, strategy, str(tmp_path), 0, 1)
    reader = WeightReader(tmp_path / "step_00000001")
    assert reader.shapes.keys() >= weights.keys()
    for name, weight in weights.items():
        assert torch.equal(reader.read(name), weight)


def exported(strategy: str, folder: str) -> torch.Tensor:
    model, _, _ = parallel_model(strategy)
    export_model(model, build_char_tokenizer(), folder=Path(folder))
    dist.barrier()
    with torch.no_grad():
        return model(input_ids=torch.arange(8).reshape(1, 8), use_cache=False).logits


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_its_export_loads_to_the_same_logits(two_ranks, tmp_path, strategy):
    from transformers import AutoModelForCausalLM

    logits, _ = two_ranks.run(exported, strategy, str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        got = model(input_ids=torch.arange(8).reshape(1, 8)).logits
    torch.testing.assert_close(got, logits, rtol=1e-5, atol=1e-6)


def answers(strategy: str) -> list[tuple[str, str, str]]:
    from automodel.data.prepare.prepared import Prompt

    model, _, dp = parallel_model(strategy)
    prompts = [Prompt(prompt_ids=[3 + i, 4, 5 + i], question=str(i), answer="x", kind=None) for i in range(5)]
    scores = GenerationEvaluation(batch_size=1, max_new_tokens=4, num_samples=5).run(
        model, build_char_tokenizer(), prompts=prompts,
        device=torch.device("cpu"), dp_group=dp.group,
    )  # fmt: skip
    return scores.samples


@pytest.mark.parametrize(("world", "strategy"), [(2, "ddp"), (2, "fsdp2"), (2, "zero1"), (2, "zero3"), (4, "hsdp"),
                                                 (4, "tp2 sequence")])  # fmt: skip
def test_generated_answers_do_not_depend_on_the_layout(ranks, world, strategy):
    ((*expected,),) = ranks[1].run(answers, "ddp")
    assert len(expected) == 5
    for got in ranks[world].run(answers, strategy):
        assert got == expected


def failing_answers() -> str:
    from automodel.distributed.runtime.agreement import PeerError

    class Broken(GenerationEvaluation):
        def _generate(self, *args: Any, **options: Any) -> list[str]:
            if dist.get_rank() == 1:
                raise KeyError("no such token")
            return super()._generate(*args, **options)

    from automodel.data.prepare.prepared import Prompt

    model, _, dp = parallel_model("ddp")
    prompts = [Prompt(prompt_ids=[3], question="", answer="", kind=None)] * 4
    try:
        Broken(batch_size=1, max_new_tokens=2).run(
            model, build_char_tokenizer(), prompts=prompts, device=torch.device("cpu"),
            dp_group=dp.group,
        )  # fmt: skip
    except (PeerError, KeyError) as error:
        return str(error)
    return ""


def answers_cut_short(strategy: str) -> tuple[bool, int]:
    from automodel.data.prepare.prepared import Prompt
    from automodel.distributed.runtime.agreement import CutShort, StopPoll

    rounds = []

    class Counting(GenerationEvaluation):
        def _generate(self, *args: Any, **options: Any) -> list[str]:
            rounds.append(1)
            if strategy == "ddp" and len(rounds) == 2 and dist.get_rank() == 0:
                get_store().wait(["stop/requested"])  # these ranks do not go together
            return super()._generate(*args, **options)

    model, _, dp = parallel_model(strategy)
    prompts = [Prompt(prompt_ids=[3, 4], question="", answer="", kind=None)] * 40
    try:
        Counting(batch_size=1, max_new_tokens=1).run(
            model, build_char_tokenizer(), prompts=prompts,
            device=torch.device("cpu"), dp_group=dp.group,
            poll=StopPoll(lambda: dist.get_rank() == 1 and len(rounds) >= 1),
        )  # fmt: skip
    except CutShort:
        dist.barrier()
        if dist.get_rank() == 0:
            get_store().delete_key("stop/requested")
        dist.barrier()
        return True, len(rounds)
    return False, len(rounds)


@pytest.mark.parametrize(("world", "strategy"), [(2, "ddp"), (2, "fsdp2"), (4, "tp2")])
def test_answering_ends_on_every_rank_when_one_is_asked_to_stop(ranks, world, strategy):
    results = ranks[world].run(answers_cut_short, strategy)
    assert all(is_cut for is_cut, _ in results)
    assert max(num_rounds for _, num_rounds in results) <= 3  # of 10 to 20


def test_what_one_rank_fails_at_while_answering_reaches_all(two_ranks):
    assert all("no such token" in told for told in two_ranks.run(failing_answers))
