"""Record every figure of a table of runs, and compare two records bit for bit.

    python -m benchmarks.record OUT.json [NAME ...]
    python -m benchmarks.record --compare BEFORE.json AFTER.json

A change that only moves code must leave every figure as it is: the losses, gradient norms and learning rates of ten
steps, all validation scores, and a hash of the final weights. Records are comparable only on one machine, with the same
versions of torch and transformers. The runs read the rows and the model beside the repository, in ``../shared/data``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from automodel.runs.records import read_records
from tests.conftest import SHARED_DATA
from tests.dist.parity import Task, run_layout
from tests.dist.pool import RankPool

ROOT = Path(__file__).parents[1]
SFT, SEQCLS = SHARED_DATA / "sft", SHARED_DATA / "seqcls"
MODEL = ["model=hf", f"model.pretrained_model_name_or_path={SHARED_DATA}/models/stories260k"]
GSM8K = [*MODEL, "dataset=jsonl", f"dataset.path={SFT}/gsm8k_train.jsonl", "dataset.limit=200",
         "dataset.max_length=256", "validation_dataset=jsonl", f"validation_dataset.path={SFT}/gsm8k_test.jsonl",
         "validation_dataset.limit=9", "evaluation=loss", "step_scheduler.val_every_steps=5",
         "step_scheduler.ckpt_every_steps=5", "optimizer.lr=1e-3", "step_scheduler.max_steps=10"]  # fmt: skip
TWO, FOUR = ["launch.nproc_per_node=2"], ["launch.nproc_per_node=4"]
FSDP2 = [*TWO, "distributed=fsdp2"]
MIXTURE = [*MODEL, "dataset=mixture", f"dataset.sources.gsm8k.path={SFT}/gsm8k_train.jsonl",
           "dataset.sources.gsm8k.limit=60", "dataset.sources.gsm8k.weight=3",
           f"dataset.sources.alpaca.path={SFT}/alpaca.jsonl", "dataset.sources.alpaca.limit=60",
           "dataset.sources.alpaca.weight=1", "evaluation=loss", "validation_dataset=none", "optimizer.lr=1e-3",
           "step_scheduler.max_steps=10"]  # fmt: skip
CLASSES = [*MODEL, "recipe=llm_seq_cls", "dataset=jsonl", f"dataset.path={SEQCLS}/sst2_train.jsonl",
           "dataset.limit=120", "validation_dataset=jsonl", f"validation_dataset.path={SEQCLS}/sst2_val.jsonl",
           "validation_dataset.limit=20", "optimizer.lr=1e-3", "step_scheduler.max_steps=10"]  # fmt: skip

RUNS: dict[str, list[list[str]]] = {
    "demo": [["step_scheduler.max_steps=10", "evaluation=loss"]],
    "one process": [GSM8K],
    "accumulated": [[*GSM8K, "step_scheduler.local_batch_size=4"]],
    "ddp 2": [[*GSM8K, *TWO]],
    "fsdp2 2": [[*GSM8K, *FSDP2]],
    "fsdp2 2 bf16": [[*GSM8K, *FSDP2, "distributed.mixed_precision=bf16"]],
    "hsdp 4": [[*GSM8K, *FOUR, "distributed=fsdp2", "distributed.dp_replicate_size=2"]],
    "tp 2": [[*GSM8K, *FSDP2, "distributed.tp_size=2"]],
    "lora": [[*GSM8K, "peft=lora", "peft.dropout=0.1"]],
    "lora fsdp2 2": [[*GSM8K, *FSDP2, "peft=lora"]],
    "packed": [[*GSM8K, "packing.enabled=true"]],
    "grouped by tokens": [[*GSM8K, "dataloader.length_grouped=true", "dataloader.max_tokens_per_batch=1024"]],
    "streamed and packed": [[*GSM8K, "dataset.streaming=true", "dataset.buffer_rows=50", "packing.enabled=true"]],
    "mixture": [MIXTURE],
    "classifier": [CLASSES],
    "classifier ddp 2": [[*CLASSES, *TWO]],
    "resumed": [[*GSM8K, "step_scheduler.max_steps=5", "lr_scheduler=constant"], [*GSM8K, "lr_scheduler=constant"]],
    "resumed in another layout": [[*GSM8K, *FSDP2, "step_scheduler.max_steps=5", "lr_scheduler=constant"],
                                  [*GSM8K, "lr_scheduler=constant"]],
    "generation": [[*GSM8K, "evaluation=generation", "evaluation.max_new_tokens=6", "evaluation.batch_size=2"]],
    "generation fsdp2 2": [[*GSM8K, *FSDP2, "evaluation=generation", "evaluation.max_new_tokens=6",
                            "evaluation.batch_size=2"]],
}  # fmt: skip
"""Of each run, the command lines that are given one after the other with the same ``output_dir``."""

IN_PROCESS = {"zero1": "megatron zero1 2", "zero3": "megatron zero3 2"}
"""Strategies that run here on a stand-in for CUDA's streams alone, and so in the ranks of the tests."""

_NOT_REPEATED = ("time", "sec", "tps", "tokens_per", "mem", "mfu", "utilisation", "rows_per")


def main() -> None:
    """Write a record, or compare two and end with status 1 where they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", nargs=2, metavar=("BEFORE", "AFTER"), type=Path)
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("names", nargs="*")
    args = parser.parse_args()
    if args.compare:
        sys.exit(compare(*(json.loads(path.read_text()) for path in args.compare)))
    if args.out is None:
        parser.error("give the file to write, or --compare")
    record = {"torch": torch.__version__}
    for name, figures in _all_runs(args.names):
        record[name] = figures()
        losses = record[name]["losses"]
        print(f"{name:28} {losses[0]:.6f} -> {losses[-1]:.6f}  {record[name]['weights'][:12]}", flush=True)
        args.out.write_text(json.dumps(record, indent=1, sort_keys=True))


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print every figure that differs, and return the status: 1 where there is one or a run is missing."""
    different = [name for name in before if before[name] != after.get(name)]
    for name in different:
        one, other = before[name], after.get(name)
        if not isinstance(one, dict) or not isinstance(other, dict):
            print(f"{name}: {'missing' if other is None else f'{one} and {other}'}")
            continue
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key):
                print(f"{name}, {key}:\n  {one.get(key)}\n  {other.get(key)}")
    print(f"{len(before) - len(different)} of {len(before)} entries are the same bit for bit")
    return 1 if different else 0


def _all_runs(names: list[str]) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    for name, command_lines in RUNS.items():
        if not names or name in names:
            yield name, lambda lines=command_lines: _figures_of_commands(lines)
    for strategy, name in IN_PROCESS.items():
        if not names or name in names:
            yield name, lambda of=strategy: _figures_in_process(of)


def _figures_of_commands(command_lines: list[list[str]]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="record-") as folder:
        run = Path(folder) / "run"
        for argv in command_lines:
            command = [sys.executable, "-m", "automodel.run", *argv, f"output_dir={run}"]
            done = subprocess.run(
                command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        lines = read_records(run / "metrics.jsonl")
        weights: dict[str, torch.Tensor] = {}
        for path in sorted((run / "model").glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    return {
        "losses": [line["loss"] for line in lines if line["kind"] == "train"],
        "lines": [{k: v for k, v in line.items() if _is_repeated(k)} for line in lines],
        "weights": _hash(weights),
    }


def _figures_in_process(strategy: str) -> dict[str, Any]:
    pool = RankPool(2)
    try:
        losses, norms, weights = pool.run(run_layout, strategy, 4, True, Task(is_short=True, optimizer="adamw"))[0]
    finally:
        pool.close()
    return {"losses": losses, "lines": norms, "weights": _hash(weights)}


def _is_repeated(key: str) -> bool:
    return key != "timestamp" and not any(part in key for part in _NOT_REPEATED)


def _hash(weights: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].dtype} {tuple(weights[name].shape)}".encode())
        digest.update(weights[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
