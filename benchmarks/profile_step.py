"""Print where the time of an optimizer step goes on the CPU, in percent of wall time.

    python -m benchmarks.profile_step [--case small] [--steps 3] [key=value ...]

It profiles this project's own step on a case of ``benchmarks.compare``, in this process; the keys change its
configuration. The loss includes the projection onto the vocabulary. Profiling takes time for every operator, so small
operators look slower than they are: compare shares, and take rates from ``benchmarks.compare``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.cases import CASES, prepare
from benchmarks.contenders import NUM_SKIPPED, ROOT, our_arguments

LOSS = "benchmark: loss"
MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul")
PARTS = ("matmul", "attention", "loss", "optimizer", "other operators")
OUTSIDE = "outside operators"
NODE = "autograd::engine::evaluate_function"
"""How the profiler calls the run of an autograd node in the backward; it has the number of the forward's operator."""


@dataclass
class MarkedObjective:
    """An objective whose part after the model's body is marked as the loss in a profile.

    Attributes:
        body: of the model that the objective runs; the loss begins where its forward ends.
    """

    objective: Any
    body: nn.Module
    _open: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.body.register_forward_hook(self._begin)

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        sums = self.objective(model, batch)
        if not self._open:
            raise RuntimeError(f"the objective did not run {type(self.body).__name__}")
        self._open.pop().__exit__(None, None, None)
        return sums

    def count(self, batch: Any) -> int:
        return self.objective.count(batch)

    def _begin(self, *args: Any) -> None:
        self._open.append(record_function(LOSS).__enter__())


def shares(events: Sequence[Any], wall_sec: float) -> tuple[dict[str, float], Counter[str]]:
    """Return the share of ``wall_sec`` of each part, and the microseconds of each operator that is in no part.

    Args:
        events: of a profile, in which ``MarkedObjective`` marked the loss.
    """
    of_loss = _loss_nodes(events)
    micros: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for event in events:
        part = _part(event, of_loss)
        micros[part] += event.self_cpu_time_total
        if part == "other operators":
            others[event.name] += event.self_cpu_time_total
    found = {part: micros[part] / 1e6 / wall_sec for part in PARTS}
    return found | {OUTSIDE: 1 - sum(found.values())}, others


def _part(event: Any, of_loss: set[int]) -> str:
    for each in _with_parents(event):
        if each.name == LOSS or (each.name.startswith(NODE) and each.sequence_nr in of_loss):
            return "loss"
        if each.name.startswith(("Optimizer.step", "Optimizer.zero_grad")):
            return "optimizer"
        if "scaled_dot_product" in each.name or "ScaledDotProduct" in each.name:
            return "attention"
    return "matmul" if event.name in MATMULS else "other operators"


def _loss_nodes(events: Sequence[Any]) -> set[int]:
    """Return the sequence numbers of the autograd nodes that the marked ranges made.

    An operator carries the number that the next node will have, also where it makes none. So a number that an operator
    after a range carries as well is not one of the range's nodes.
    """
    forward = [event for event in events if event.sequence_nr >= 0 and not _is_in_backward(event)]
    found: set[int] = set()
    for loss in (event for event in events if event.name == LOSS):
        end = loss.time_range.end
        limit = min((event.sequence_nr for event in forward if event.time_range.start >= end), default=None)
        inside = {event.sequence_nr for event in forward if loss.time_range.start <= event.time_range.start < end}
        found |= {number for number in inside if limit is None or number < limit}
    return found


def _is_in_backward(event: Any) -> bool:
    return any(each.name.startswith(NODE) for each in _with_parents(event))


def _with_parents(event: Any) -> Iterable[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def profile_steps(argv: list[str], *, num_steps: int) -> tuple[dict[str, float], Counter[str], float]:
    """Take ``num_steps`` steps as ``automodel.run argv`` would; return ``shares`` and the seconds of a step."""
    from automodel.config import load_command_line
    from automodel.distributed.parallel.handle import unwrap
    from automodel.distributed.runtime.dist_info import destroy_global_state, initialize_distributed
    from automodel.runner.assembly import assemble
    from automodel.runner.job import Job
    from automodel.runner.recipe import build_recipe
    from automodel.train.step import StepConfig, train_step

    cfg, _ = load_command_line(argv)
    job = Job(cfg, initialize_distributed(cfg.dist_env.backend))
    parts = assemble(job, build_recipe(cfg))
    objective = MarkedObjective(parts.objective, unwrap(parts.model).base_model)
    config = StepConfig(
        device=job.dist_info.device,
        dp_group=job.dp.group,
        defer_grad_sync=job.strategy.defer_grad_sync,
        clip_norm=cfg.clip_grad_norm.max_norm,
        autocast=job.autocast,
    )
    parts.model.train()
    batches = iter(parts.loader)

    def take(number: int) -> float:
        start = time.perf_counter()
        for _ in range(number):
            train_step(parts.model, next(batches), objective=objective, optimizer=parts.optimizer, config=config)
        return time.perf_counter() - start

    take(NUM_SKIPPED)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        wall_sec = take(num_steps)
    destroy_global_state()
    return *shares(profiled.events(), wall_sec), wall_sec / num_steps


def main() -> None:
    """Print the shares, and the largest operators among the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", choices=[name for name, case in CASES.items() if case.num_ranks == 1], default="small"
    )
    parser.add_argument("--steps", type=int, default=3, help=f"that are profiled, after {NUM_SKIPPED} that are not")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="see benchmarks/README.md")
    args, keys = parser.parse_known_args()
    case = CASES[args.case]
    torch.set_num_threads(case.num_threads)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        job = prepare(case, args.data, folder, num_steps=args.steps + NUM_SKIPPED)
        found, others, step_sec = profile_steps([*our_arguments(job, folder), *keys], num_steps=args.steps)
    print(f"{case.title}: {step_sec:.2f} s a step under the profiler")
    for part, share in found.items():
        print(f"{part:18}{share:7.1%}")
    total = sum(found.values()) * step_sec * args.steps * 1e6
    largest = ", ".join(f"{operator} {micros / total:.1%}" for operator, micros in others.most_common(6))
    print(f"the largest of the other operators: {largest}")


if __name__ == "__main__":
    main()
