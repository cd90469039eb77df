"""The small parts of training: schedules, steps, signals, seeds, speed."""

from __future__ import annotations

import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from automodel.optim.optimizers import adamw, parameter_groups, sgd
from automodel.optim.schedules import constant, cosine, linear
from automodel.train.flops import TrainingFlops
from automodel.train.meter import Meter
from automodel.train.rng import rng_state, seed_everything, set_rng_state
from automodel.train.save_clock import SaveClock
from automodel.train.signals import StopRequest
from automodel.train.step_scheduler import StepScheduler


def rates(schedule, total_steps: int, **options) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer, total_steps, **options)
    out = []
    for _ in range(total_steps):
        out.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return out


def test_warm_up_reaches_the_peak_in_a_straight_line():
    assert rates(constant, 6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_follows_its_formula_and_the_minimum_would_come_one_step_after_the_last():
    got = rates(cosine, 10, warmup_steps=2, min_lr_ratio=0.1)
    # The peak is step 2 and the end of the decay step 11: nine steps apart.
    expected = [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 9)) for k in range(9)]
    assert got == pytest.approx([0.5, *expected])
    assert expected[0] == 1.0


def test_linear_goes_down_in_a_straight_line_from_the_peak():
    assert rates(linear, 4, warmup_steps=0) == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert rates(linear, 5, warmup_steps=2, min_lr_ratio=0.2) == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4])


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 100])
@pytest.mark.parametrize(("schedule", "name"), [(cosine, "cosine"), (linear, "linear"), (constant, "constant")])
def test_without_warm_up_the_rates_are_those_of_transformers(schedule, name, num_steps):
    from transformers import get_scheduler

    def theirs(optimizer: torch.optim.Optimizer, total_steps: int):
        return get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=total_steps)

    assert rates(schedule, num_steps, warmup_steps=0) == pytest.approx(rates(theirs, num_steps))


@pytest.mark.parametrize("schedule", [cosine, linear, constant])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("options", [{}, {"warmup_steps": 0}, {"warmup_steps": 1}, {"warmup_steps": 3}])
def test_every_step_trains_and_the_peak_is_reached(schedule, num_steps, options):
    got = rates(schedule, num_steps, **options)
    num_warmup = options.get("warmup_steps") or 1
    assert min(got) > 0
    assert max(got) == pytest.approx(min(1.0, num_steps / num_warmup))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [(cosine, {1: [1], 2: [1, 0.5], 3: [1, 0.75, 0.25]}), (linear, {1: [1], 2: [1, 1 / 2], 3: [1, 2 / 3, 1 / 3]})],
)
def test_short_runs_train_at_rates_that_make_sense(schedule, expected):
    assert {n: rates(schedule, n) for n in expected} == {n: pytest.approx(rates) for n, rates in expected.items()}


@pytest.mark.parametrize(("num_warmup", "share"), [(4, "100%"), (8, "50%")])
def test_a_warm_up_that_takes_the_whole_run_is_reported(caplog, num_warmup, share):
    assert rates(cosine, 4, warmup_steps=num_warmup) == pytest.approx([k / num_warmup for k in (1, 2, 3, 4)])
    assert (
        f"takes {num_warmup} steps and the run has 4" in caplog.text and f"it is {share} of optimizer.lr" in caplog.text
    )


@pytest.mark.parametrize(("num_steps", "options"), [(1, {}), (2, {}), (50, {}), (4, {"warmup_steps": 3})])
def test_a_warm_up_that_ends_in_time_is_no_warning(caplog, num_steps, options):
    rates(cosine, num_steps, **options)
    assert not caplog.text


def test_the_warm_up_ratio_counts_whole_steps():
    assert rates(constant, 100, warmup_ratio=0.03)[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates(constant, 100, warmup_ratio=0.07)[5:8] == pytest.approx([6 / 7, 1, 1])  # and not an eighth


def test_norms_and_biases_are_not_decayed():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[0].weight.requires_grad_(True)
    groups = parameter_groups(model)
    for build in (adamw, sgd):
        optimizer = build(groups, lr=0.1, weight_decay=0.5)
        decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        assert decayed == {id(model[0].weight)}


def test_frozen_parameters_are_left_out():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(model)] == [1]


def test_the_shorter_of_epochs_and_max_steps_ends_training():
    assert StepScheduler(10, num_epochs=3).total_steps == 30
    assert StepScheduler(10, num_epochs=3, max_steps=7).total_steps == 7
    assert StepScheduler(10, num_epochs=3, max_steps=70).total_steps == 30


def test_what_is_due_at_each_step():
    steps = StepScheduler(5, num_epochs=2, val_every_steps=4, ckpt_every_steps=3, log_every_steps=2)
    due = {"log": [], "val": [], "ckpt": []}
    for step in range(1, 11):
        steps.step = step
        for name, is_due in (("log", steps.is_log_step), ("val", steps.is_val_step), ("ckpt", steps.is_ckpt_step)):
            if is_due:
                due[name].append(step)
    assert due == {"log": [1, 2, 4, 6, 8, 10], "val": [4, 8, 10], "ckpt": [3, 6, 9, 10]}
    assert (steps.count(4), steps.count(5), steps.count(None)) == (3, 2, 1)


def test_a_stream_has_no_end_but_max_steps_until_it_comes():
    steps = StepScheduler(None, num_epochs=3, max_steps=9, step=5)
    assert steps.total_steps == 9 and not steps.is_last_step
    steps.end_here()
    assert steps.total_steps == 5 and steps.is_last_step


def test_a_stop_signal_is_noted_and_the_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with StopRequest() as stop:
        assert not stop.is_set
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.is_set and stop.signal_name == "SIGUSR1"
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_second_ctrl_c_interrupts():
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set
        os.kill(os.getpid(), signal.SIGINT)


def test_random_state_comes_back_and_ranks_draw_apart():
    seed_everything(3, rank=0)
    first = torch.rand(2)
    state = rng_state()
    expected = torch.rand(2)
    set_rng_state(state)
    assert torch.equal(torch.rand(2), expected)
    seed_everything(3, rank=1)
    assert not torch.equal(torch.rand(2), first)


def test_the_meter_counts_training_alone(monkeypatch):
    clock = iter([0.0, 2.0, 100.0, 102.0])
    monkeypatch.setattr("automodel.train.meter.time.perf_counter", lambda: next(clock))
    meter = Meter(torch.device("cpu"), world_size=2, flops=TrainingFlops())
    for _ in range(2):
        with meter.training():
            meter.count(SimpleNamespace(num_label_tokens=9, num_tokens=100, num_slots=125, sum_squared_lengths=1000))
    figures = meter.read()
    assert (figures["tokens_per_sec"], figures["tokens_per_sec_per_device"], figures["step_time_sec"]) == (50, 25, 2)
    assert figures["padding_share"] == pytest.approx(0.2)
    assert figures["mfu"] is None and figures["peak_mem_gib"] > 0


def test_a_rank_on_the_cpu_takes_no_memory_of_a_device_that_is_there(monkeypatch):
    def open_context(*args):
        raise AssertionError("this would open a context on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", open_context)
    monkeypatch.setattr(torch.cuda, "set_rng_state", open_context)
    state = rng_state()
    assert "cuda" not in state
    set_rng_state(state | {"cuda": "00"})


def due(**options) -> tuple[list[int], list[int]]:
    """Return the steps at which an evaluation and a checkpoint are due."""
    steps = StepScheduler(10_000, num_epochs=1, **options)
    found = ([], [])
    for step in range(1, steps.total_steps + 1):
        steps.step = step
        for name, is_due in enumerate((steps.is_val_step, steps.is_ckpt_step)):
            found[name].extend([step] if is_due else [])
    return found


def test_auto_evaluates_a_few_times_in_short_and_long_runs_and_saves_by_the_clock():
    auto = {"val_every_steps": "auto", "ckpt_every_steps": "auto"}
    assert due(max_steps=20, **auto) == ([4, 8, 12, 16, 20], [20])
    assert due(max_steps=3, **auto) == ([1, 2, 3], [3])
    assert due(max_steps=9999, **auto)[0] == [2000, 4000, 6000, 8000, 9999]
    assert due(max_steps=20) == ([20], [20])
    assert due(max_steps=20, keeps_best=True, **auto)[1] == [4, 8, 12, 16, 20]
    assert due(max_steps=20, keeps_best=True, val_every_steps="auto", ckpt_every_steps=8)[0] == [8, 16, 20]


def test_the_clock_asks_for_a_save_every_minute_or_so_and_seldom_where_saves_take_long():
    now = [0.0]
    clock = SaveClock(lambda: now[0])
    for second, save_sec, expected in ((59, 0, False), (60, 0, True), (60, 9, False), (90, 9, True), (1800, 999, True)):
        now[0] = second
        assert clock.is_due(save_sec=save_sec) is expected, second
    clock.restart()
    assert not clock.is_due(save_sec=0)
