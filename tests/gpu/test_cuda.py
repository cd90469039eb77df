"""The main job on a CUDA device: bf16, nccl, one rank, each strategy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.recipes.command import command_line as run  # each in a CUDA context of its own
from tests.recipes.command import records

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]
SHORT = ["evaluation=loss", "validation_dataset.limit=64", "dataset.limit=640", "step_scheduler.max_steps=10",
         "step_scheduler.log_every_steps=1"]  # fmt: skip


STRATEGIES = ["ddp", "fsdp2", "megatron_fsdp"]


def require_package(strategy: str) -> None:
    if strategy == "megatron_fsdp":
        pytest.importorskip("megatron_fsdp")


@pytest.mark.parametrize("options", [["ddp"], ["fsdp2"], *(["megatron_fsdp", f"zero_stage={n}"] for n in (1, 2, 3))])
def test_every_strategy_equals_the_plain_step(tmp_path: Path, options: list[str]):
    require_package(options[0])
    chosen = [f"distributed={options[0]}", *(f"distributed.{option}" for option in options[1:])]
    layouts = {"plain": ["distributed=ddp", "dist_env.backend=gloo"], "cuda": chosen}
    for name, layout in layouts.items():
        run(*SHORT, *layout, "distributed.mixed_precision=float32", "step_scheduler.local_batch_size=8",
            f"output_dir={tmp_path}/{name}")  # fmt: skip
    for one, other in zip(records(tmp_path / "plain"), records(tmp_path / "cuda"), strict=True):
        # float32 with other kernels, over ten steps from fresh weights
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bf16_follows_float32(tmp_path: Path, strategy: str):
    require_package(strategy)
    for precision in ("float32", "bf16"):
        run(*SHORT, f"distributed={strategy}", f"distributed.mixed_precision={precision}",
            f"output_dir={tmp_path}/{precision}")  # fmt: skip
    record = json.loads((tmp_path / "bf16" / "run.json").read_text())
    assert record["device"].startswith("cuda") and record["backend"] == "nccl"
    for one, other in zip(records(tmp_path / "float32"), records(tmp_path / "bf16"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.05)
        assert other["peak_mem_gib"] > 0


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_packed_documents_are_kept_apart_and_count_as_rows_do(tmp_path: Path, attention: str):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    precision = "bf16" if attention == "flash_attention_2" else "float32"
    totals = {}
    for is_packed in (False, True):
        out = tmp_path / str(is_packed)
        run("evaluation=loss", "validation_dataset=none", "dataset.limit=640", f"model.attn_implementation={attention}",
            f"packing.enabled={str(is_packed).lower()}", f"distributed.mixed_precision={precision}",
            "optimizer.lr=1e-9", "step_scheduler.num_epochs=1", "step_scheduler.log_every_steps=1",
            f"output_dir={out}")  # fmt: skip
        lines = records(out)
        tokens = sum(line["num_label_tokens"] for line in lines)
        totals[is_packed] = (tokens, sum(line["loss"] * line["num_label_tokens"] for line in lines) / tokens)
    assert totals[True][0] == totals[False][0]
    assert totals[True][1] == pytest.approx(totals[False][1], rel=1e-2 if precision == "bf16" else 1e-5)


def test_the_step_equals_the_cpus(tmp_path: Path):
    for backend in ("auto", "gloo"):
        run(*SHORT, f"dist_env.backend={backend}", "distributed.mixed_precision=float32",
            f"output_dir={tmp_path}/{backend}")  # fmt: skip
    for one, other in zip(records(tmp_path / "gloo"), records(tmp_path / "auto"), strict=True):
        # float32 with other kernels, over ten steps from fresh weights
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_goes_on(tmp_path: Path, strategy: str):
    require_package(strategy)
    argv = [*SHORT, f"distributed={strategy}", "rng.deterministic=true", "step_scheduler.ckpt_every_steps=5"]
    run(*argv, f"output_dir={tmp_path}/run")
    whole = [record["loss"] for record in records(tmp_path / "run")]
    import shutil

    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000010")
    run(*argv, f"output_dir={tmp_path}/run")
    assert [record["loss"] for record in records(tmp_path / "run")] == whole
