"""Prepare and pack the same rows as TRL does, in turns, and print the median rates and how full the packs are.

    python -m benchmarks.preparation MODEL_FOLDER ROWS.jsonl [MAX_LENGTH] [NUM_ROUNDS]

ROWS holds ``question`` and ``answer``; every row is taken ten times, with its number before the question. Needs trl.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

COPIES = 10


def main() -> None:
    model_folder, rows = sys.argv[1:3]
    max_length = int(sys.argv[3]) if len(sys.argv) > 3 else 512
    num_rounds = int(sys.argv[4]) if len(sys.argv) > 4 else 3
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    results: dict[str, list[tuple[float, int, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = _copies(Path(rows), folder)
        num_rows = sum(1 for _ in path.open())
        for turn in range(num_rounds):
            for who, prepare in (("automodel", _ours), ("trl", _theirs)):
                for num_proc in (1, 2):
                    os.environ["AUTOMODEL_CACHE"] = str(folder / f"cache-{turn}-{num_proc}")
                    result = prepare(model_folder, path, max_length, num_proc, folder / f"trl-{turn}-{num_proc}")
                    results.setdefault(f"{who}, {num_proc} process{'es' * (num_proc > 1)}", []).append(result)
    print(f"{num_rows:,} rows, packed to {max_length} tokens; medians of {num_rounds}")
    for name, runs in results.items():
        seconds, num_tokens = median(run[0] for run in runs), runs[0][1]
        rates = f"{num_rows / seconds:8,.0f} rows/s {num_tokens / seconds:10,.0f} tokens/s"
        print(f"{name:24}{seconds:7.1f} s {rates}  {num_tokens:,} tokens, {runs[0][2]:.2%} of the slots")


def _copies(rows: Path, folder: Path) -> Path:
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for copy in range(COPIES):
            for line in rows.read_text().splitlines():
                row = json.loads(line)
                file.write(json.dumps({"prompt": f"{copy}: {row['question']}\n", "completion": row["answer"]}) + "\n")
    return path


def _ours(model_folder: str, path: Path, max_length: int, num_proc: int, folder: Path) -> tuple[float, int, float]:
    from transformers import AutoTokenizer

    from automodel.data.batches.train_set import build_train_set
    from automodel.data.sources import FileDataset
    from tests.unit.rows import load_sft

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    source = FileDataset(path=str(path), max_length=max_length, num_proc=num_proc)
    start = time.perf_counter()
    rows = load_sft(source, tokenizer, model_max_length=None, keeps_prompts=False)
    train_set = build_train_set({"rows": rows}, pack_length=max_length, mixture=None, seed=0)
    seconds = time.perf_counter() - start
    return seconds, int(train_set.lengths.sum()), float(train_set.shares[0].efficiency)


def _theirs(model_folder: str, path: Path, max_length: int, num_proc: int, folder: Path) -> tuple[float, int, float]:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    config = SFTConfig(
        output_dir=str(folder), max_length=max_length, packing=True, dataset_num_proc=num_proc, report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    start = time.perf_counter()
    rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))
    trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    seconds = time.perf_counter() - start
    num_tokens = sum(map(len, trainer.train_dataset["input_ids"]))
    return seconds, num_tokens, num_tokens / (len(trainer.train_dataset) * max_length)


if __name__ == "__main__":
    main()
