"""What the benchmark computes from its runs, and what the profile of a step counts to which part."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from automodel.data.batches.collate import CausalLMCollator
from automodel.losses.cross_entropy import CrossEntropy
from automodel.losses.objective import as_objective
from benchmarks.compare import differing_work, readme_rows, summary, table
from benchmarks.contenders import ContenderError, _run, summarised
from benchmarks.profile_step import MarkedObjective, _loss_nodes, _part, shares
from tests.dist.tiny import tiny_llama, uneven_rows

STEPS = [
    {"end": 110.0, "num_tokens": 1000, "loss": 6.0},
    {"end": 112.0, "num_tokens": 1000},
    {"end": 113.0, "num_tokens": 300},
    {"end": 115.0, "num_tokens": 600, "loss": 4.0},
]
OURS = summarised(STEPS, start=100.0, peak_mem_gib=1.5)


def test_first_steps_count_for_the_start_and_not_for_the_rate():
    assert OURS.first_step_sec == 10.0
    assert OURS.tokens_per_sec == 900 / 3
    assert OURS.losses == (6.0, 4.0)


def test_mean_loss_of_the_others_is_that_of_their_own_losses():
    steps = [step | {"loss": loss} for step, loss in zip(STEPS, (6.0, 5.0, 4.0, 3.0), strict=True)]
    assert summarised(steps, start=100.0, peak_mem_gib=1.5).losses == (6.0, 4.0)


def test_other_rows_or_losses_are_another_training():
    assert differing_work(OURS, replace(OURS, tokens_per_sec=7.0, losses=(6.0001, 4.0))) is None
    assert "tokens" in differing_work(OURS, replace(OURS, num_tokens=[1000, 1000, 300, 599]))
    assert "losses" in differing_work(OURS, replace(OURS, losses=(6.0, 4.1)))


def test_ratio_compares_the_two_runs_of_a_pair():
    twice, slow = replace(OURS, tokens_per_sec=600.0), replace(OURS, tokens_per_sec=100.0)
    found = summary({"plain": [(OURS, twice), (slow, slow), (slow, OURS)], "trl": [(slow, OURS)], "trl-packed": []})
    assert found["plain"]["ratios"] == [2.0, 1.0, 3.0]
    assert found["plain"]["tokens_per_sec"] == 300.0
    assert found["automodel"]["tokens_per_sec"] == 100.0
    assert found["automodel"]["num_runs"] == 4
    assert "| plain PyTorch loop | 300 | 2.00 (1.00 to 3.00) | 1.50 | 10.0 | 3 |" in table(found)
    about = {"date": "D", "commit": "C", "machine": "M", "versions": {"torch": "1"}, "command": "X"}
    row = (
        "| D | C | M | torch 1 | `X` | small | 100 / 300 / - / 300 | 1.50 / 1.50 / - / 1.50 | 10.0 / 10.0 / - / 10.0 |"
    )
    assert readme_rows(about | {"cases": {"small": {"summary": found}}}) == [row]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="peaks are read from /proc")
def test_peak_memory_is_the_sum_over_the_ranks_without_their_launcher(tmp_path: Path):
    rank = "import time; held = b'x' * (100 * 2**20); held = None; time.sleep(1.5)"
    (tmp_path / "launch.py").write_text(
        "import os, subprocess, sys\n"
        "held = b'x' * (300 * 2**20)\n"
        f"ranks = [subprocess.Popen([sys.executable, '-c', {rank!r}], env=os.environ | {{'RANK': str(rank)}})"
        " for rank in range(2)]\n"
        "sys.exit(max(rank.wait() for rank in ranks))\n"
    )
    peak_mem_gib = _run([sys.executable, str(tmp_path / "launch.py")], {}, tmp_path / "log", num_ranks=2)
    assert 200 / 1024 < peak_mem_gib < 280 / 1024


def test_failure_of_a_contender_is_reported_with_its_last_lines(tmp_path: Path):
    with pytest.raises(ContenderError, match=r"status 3: .*\n9\n10$"):
        _run([sys.executable, "-c", "print(9); print(10); raise SystemExit(3)"], {}, tmp_path / "log", num_ranks=1)


def test_readme_names_every_script():
    folder = Path(__file__).parents[2] / "benchmarks"
    text = (folder / "README.md").read_text(encoding="utf-8")
    parts_of_compare = {"__init__", "cases", "contenders"}
    missing = [path.name for path in folder.glob("*.py") if path.stem not in text and path.stem not in parts_of_compare]
    assert missing == []


def test_options_are_checked():
    argv = [sys.executable, "-m", "benchmarks.compare", "--peers", "plain,axolotl"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "axolotl" in done.stderr


def test_profile_counts_the_projection_and_its_backward_to_the_loss():
    model = tiny_llama(tied=False)
    objective = MarkedObjective(as_objective(CrossEntropy()), model.base_model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batches = [CausalLMCollator(0)(uneven_rows(6)), CausalLMCollator(0)(uneven_rows(4))]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for batch in batches:
            objective(model, batch).loss.backward()
        optimizer.step()
    events = profiled.events()
    of_loss = _loss_nodes(events)
    products = Counter(_part(event, of_loss) for event in events if event.name == "aten::mm")
    # One product in the forward of a linear layer and two in its backward; the body has 7 in each of 2 layers.
    assert products == {"loss": 3 * 2, "matmul": 3 * 2 * 7 * 2}
    parts = {_part(event, of_loss) for event in events if "embedding" in event.name}
    assert parts == {"other operators"}
    found, others = shares(events, wall_sec=1000.0)
    assert sum(found.values()) == pytest.approx(1.0)
    assert min(found[part] for part in ("attention", "loss", "optimizer", "matmul")) > 0
    assert others["aten::mul"] > 0
