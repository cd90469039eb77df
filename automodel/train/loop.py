"""The train loop: one for every recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

from automodel.checkpoint.training import Checkpointer, TrainState
from automodel.data.batches.batch import Batch
from automodel.data.batches.loader import Loader
from automodel.distributed.runtime.agreement import CutShort, StopPoll, collective_timeout, set_collective_timeout
from automodel.distributed.runtime.waits import to_host
from automodel.distributed.runtime.watchdog import set_phase
from automodel.loggers.fanout import MetricSink
from automodel.logs import get_logger, warn_for_all
from automodel.losses.objective import Objective
from automodel.screen import progress
from automodel.train.meter import Meter
from automodel.train.rng import rng_state, set_rng_state
from automodel.train.save_clock import SaveClock
from automodel.train.signals import StopRequest
from automodel.train.step import StepConfig, StepResult, train_step, warm_up_buckets
from automodel.train.step_scheduler import StepScheduler
from automodel.types import RunError

log = get_logger(__name__)


class NonFiniteError(RunError):
    """The loss or the gradient norm of a step was not finite, and ``on_non_finite`` is ``stop``."""


class RunStopped(Exception):
    """A signal ended training after ``step``; ``is_saved`` says whether a complete checkpoint was written."""

    def __init__(self, step: int, *, is_saved: bool) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step
        self.is_saved = is_saved


@dataclass(frozen=True)
class Evaluator:
    """A measurement during training: ``run`` returns the entries of a validation record on every rank.

    ``run`` gets a poll that says whether any rank was asked to stop; it may then raise CutShort on every rank.
    """

    name: str
    run: Callable[[StopPoll], dict[str, Any]]


@dataclass(frozen=True)
class Timeouts:
    """Limits for collectives, in minutes: in training, and in the slow phases (start-up, evaluation, saves)."""

    training: float
    slow_phase: float


@dataclass
class TrainLoop:
    """Everything that the loop needs, built by a recipe; ``run`` trains until the last step.

    Attributes:
        loader: yields the micro-batches of each step, the same number on every rank. Every checkpoint saves its
            position.
        evaluators: run at every validation step, before a checkpoint.
        checkpointer: None if training checkpoints are off.
        metrics_size: returns the length in bytes of the metrics file, which every checkpoint saves.
        resume_facts: saved in every checkpoint, so that a later start can compare itself with them.
        dump_folder: receives the batch of a non-finite step.
        is_evaluation_due: whether the current step is still to be evaluated: the run begins with an evaluation, or was
            stopped before or during one.
    """

    model: torch.nn.Module
    objective: Objective
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    steps: StepScheduler
    loader: Loader
    step_config: StepConfig
    evaluators: Sequence[Evaluator]
    checkpointer: Checkpointer | None
    sink: MetricSink
    meter: Meter
    timeouts: Timeouts
    metrics_size: Callable[[], int]
    resume_facts: dict[str, Any]
    on_non_finite: Literal["stop", "skip"]
    dump_folder: Path
    is_evaluation_due: bool = False
    _has_trained: bool = field(default=False, init=False)
    _unread: tuple[int, StepResult, list[Batch]] | None = field(default=None, init=False)
    _save_clock: SaveClock = field(default_factory=SaveClock, init=False)
    _last_loss: float = field(default=float("nan"), init=False)
    _scores: tuple[int, dict[str, float]] = field(default=(0, {}), init=False)

    def run(self) -> None:
        """Train from the current step to the last; every rank must call it.

        On return, and when a signal has ended training, the last checkpoint is complete.

        Raises:
            RunStopped: a signal at any rank ended training early.
            NonFiniteError: a step was not finite, and ``on_non_finite`` is ``stop``.
            SaveError: as ``checkpoint.on_error`` says, and always if the last checkpoint could not be written.
        """
        try:
            self._run()
        except NonFiniteError:  # raised on every rank, so all of them can wait
            if self.checkpointer is not None:
                self.checkpointer.finish()
            raise

    def _run(self) -> None:
        self.model.train()
        first_step = self.steps.step + 1
        with StopRequest() as stop, progress(self.steps.total_steps, description="training", is_logged=False) as bar:
            poll = StopPoll(lambda: stop.is_set)
            if self.is_evaluation_due:
                self.evaluate(poll)
                if self.is_evaluation_due and self.steps.step > 0:
                    self._save_and_stop()
            self._save_clock.restart()
            batches = self._batches()
            while not self.steps.is_last_step:
                set_phase("training", step=self.steps.step + 1)
                with self.meter.training():
                    result, lr = self._train_step(next(batches), stop)
                if self.loader.is_exhausted and not self.steps.is_last_step:
                    log.info("the rows end before step_scheduler.max_steps=%d", self.steps.total_steps)
                    self.steps.end_here()
                if self.steps.step == first_step:
                    set_collective_timeout(self.timeouts.training)
                if self.steps.is_log_step:
                    self._log(result, lr)
                bar.update(self.steps.step, f"loss {self._last_loss:.4f}")
                self._evaluate_and_save(poll, result)
            self._read_flag()

    def _batches(self) -> Iterator[list[Batch]]:
        for index, micro_batches in enumerate(self.loader):
            if index == 0:
                warm_up_buckets(
                    self.model,
                    micro_batches[0],
                    objective=self.objective,
                    optimizer=self.optimizer,
                    config=self.step_config,
                )
            yield micro_batches

    def evaluate(self, poll: StopPoll) -> None:
        """Run every evaluator and log its record; every rank must call it. Random states are restored afterwards.

        If a rank is asked to stop meanwhile, nothing is logged and the evaluation stays due.
        """
        set_phase("evaluating", step=self.steps.step)
        self.is_evaluation_due = True
        rng = rng_state()
        try:
            results = [(evaluator.name, evaluator.run(poll)) for evaluator in self.evaluators]
        except CutShort:
            log.info("a signal interrupted the evaluation at step %d", self.steps.step)
            return
        finally:
            set_rng_state(rng)
        self.is_evaluation_due = False
        self._scores = (self.steps.step, {})
        for name, result in results:
            record = {"kind": "validation", "name": name, "step": self.steps.step}
            self.sink.log(record | result | {"timestamp": _now()})
            self._scores[1].update(_headline(result))
            figures = ", ".join(f"{key.removeprefix('metric/')} {value:.4f}" for key, value in _headline(result))
            log.info("%s at step %d: %s", name, self.steps.step, figures)

    def _train_step(self, micro_batches: list[Batch], stop: StopRequest) -> tuple[StepResult, float]:
        lr = self.lr_scheduler.get_last_lr()[0]
        result = train_step(
            self.model,
            micro_batches,
            objective=self.objective,
            optimizer=self.optimizer,
            config=self.step_config,
            is_first=not self._has_trained,
            wants_stop=stop.is_set or (self.checkpointer is not None and self.checkpointer.must_stop),
            wants_save=self._is_save_due_by_clock(),
        )
        self._has_trained = True
        self.lr_scheduler.step()
        self.steps.step += 1
        self.meter.count(result)
        self._read_flag()
        self._unread = (self.steps.step, result, micro_batches)
        if self.step_config.device.type == "cpu":
            self._read_flag()  # free on a CPU, and a bad step is reported at once
        return result, lr

    def _read_flag(self) -> None:
        """Check whether the previous step was finite: a step late, so the host never waits for the one in flight."""
        if self._unread is None:
            return
        step, result, micro_batches = self._unread
        self._unread = None
        if not result.is_bad.read():
            return
        what = f"step {step}: loss sum {to_host(result.loss_sum)}, gradient norm {to_host(result.grad_norm)}"
        if self.on_non_finite == "skip":
            warn_for_all(log, "%s; not finite, so no weight was changed (on_non_finite=skip)", what)
            return
        rank = torch.distributed.get_rank()
        dump = self.dump_folder / f"non_finite_step_{step}_rank_{rank}.pt"
        torch.save([dict(batch) for batch in micro_batches], dump)
        raise NonFiniteError(
            f"{what}; not finite, so no weight was changed. This rank's batch is in {dump}. What often helps: a "
            "smaller optimizer.lr, more lr_scheduler.warmup_steps, distributed.mixed_precision=float32, or fixing bad "
            "rows (see python -m automodel.preview); with on_non_finite=skip training skips such steps"
        )

    def _log(self, result: StepResult, lr: float) -> None:
        count = max(1, result.count)
        loss = to_host(result.loss_sum) / count
        self._last_loss = loss
        record = {
            "kind": "train",
            "step": self.steps.step,
            "epoch": self.loader.epoch,
            "loss": loss,
            "grad_norm": to_host(result.grad_norm),
            "lr": lr,
            "num_label_tokens": result.num_label_tokens,
            "num_tokens": result.num_tokens,
            **{f"metric/{name}": to_host(value) / count for name, value in result.terms.items()},
            **self.meter.read(),
            "timestamp": _now(),
        }
        self.sink.log(record)
        terms = "".join(f"{name} {record[f'metric/{name}']:.4f}  " for name in result.terms)
        log.info(
            "step %d/%d  loss %.4f  %sgrad norm %.3f  lr %.2e  %.0f tokens/s",
            self.steps.step, self.steps.total_steps, loss, terms, record["grad_norm"], lr, record["tokens_per_sec"],
        )  # fmt: skip

    def _evaluate_and_save(self, poll: StopPoll, result: StepResult) -> None:
        must_stop = result.num_stop_requests > 0 and not self.steps.is_last_step
        is_save_due = self.steps.is_ckpt_step or result.num_save_requests > 0
        self.is_evaluation_due = self.steps.is_val_step
        if not (self.is_evaluation_due or is_save_due or must_stop):
            return
        with collective_timeout(self.timeouts.slow_phase, then_minutes=self.timeouts.training):
            if self.is_evaluation_due and not must_stop:
                self.evaluate(poll)
            if must_stop or self.is_evaluation_due:
                self._save_and_stop()
            if is_save_due and self.checkpointer is not None:
                self._read_flag()
                self._save()
                if self.steps.is_last_step:
                    self.checkpointer.finish(must_be_saved=True)

    def _save_and_stop(self) -> NoReturn:
        if self.checkpointer is not None:
            self._read_flag()
            self._save()
            self.checkpointer.finish(must_be_saved=True)
        raise RunStopped(self.steps.step, is_saved=self.checkpointer is not None)

    def _is_save_due_by_clock(self) -> bool:
        """Return whether a save is due by the clock, which only rank 0 reads; False on the others."""
        if self.checkpointer is None or not self.steps.saves_by_clock or torch.distributed.get_rank() != 0:
            return False
        return self._save_clock.is_due(save_sec=self.checkpointer.last_save_sec)

    def _save(self) -> None:
        set_phase("saving", step=self.steps.step)
        self._save_clock.restart()
        position = {"step": self.steps.step, "loader": self.loader.state_dict(), "metrics_size": self.metrics_size()}
        measured_at, metrics = self._scores
        outcome = {"metrics": metrics if measured_at == self.steps.step else {}, "total_steps": self.steps.total_steps}
        outcome["is_evaluation_due"] = self.is_evaluation_due
        state = TrainState(self.model, self.optimizer)
        self.checkpointer.save(state, progress=self.resume_facts | position | outcome, rng=rng_state())


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _headline(record: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the entries worth a line on the screen: no counts, no breakdown by kind."""
    return [(k, v) for k, v in record.items() if isinstance(v, float) and k.count("/") < 2]
