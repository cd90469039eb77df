"""Train with transformers' Trainer or TRL's SFTTrainer, each with its best documented settings for a CPU.

    python -m benchmarks.trainers trainer|trl|trl-packed JOB.json OUT.json        (or under torchrun)

Fused AdamW, no gradient checkpointing, no pinned memory, nothing saved, and only the first and the last step logged.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.cases import Job, encode, read_rows


class Steps(TrainerCallback):
    """Notes when each step ends, and the losses that are logged."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(time.time())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def build_trainer(name: str, job: Job, folder: Path) -> Trainer:
    """Build the trainer called ``name``; its files, if any, go to ``folder``."""
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    torch.manual_seed(job.torch_seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**job.model), dtype=torch.float32)
    if name == "trainer":
        rows = Dataset.from_list([encode(tokenizer, row) for row in read_rows(job.ordered_rows)])
        arguments = TrainingArguments(**_arguments(job, folder))
        return Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer))
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        **_arguments(job, folder), max_length=job.max_length, packing=name == "trl-packed", completion_only_loss=True
    )
    rows = Dataset.from_list(read_rows(job.ordered_rows))
    return SFTTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer)


def _arguments(job: Job, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": job.local_batch_size,
        "gradient_accumulation_steps": job.num_micro_batches,
        "max_steps": job.num_steps,
        "train_sampling_strategy": "sequential",
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": job.max_grad_norm,
        "optim": "adamw_torch_fused",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
        "logging_first_step": True,
        "logging_steps": job.num_steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train(name: str, job: Job, folder: Path) -> list[dict[str, Any]]:
    """Train, and return each step's end and number of tokens; the first and the last with the loss logged there."""
    trainer, steps = build_trainer(name, job, folder), Steps()
    trainer.add_callback(steps)
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    trainer.train()
    size = job.global_batch_size
    num_tokens = [sum(lengths[start : start + size]) for start in range(0, job.num_steps * size, size)]
    records = [{"end": end, "num_tokens": count} for end, count in zip(steps.ends, num_tokens, strict=True)]
    for record, loss in zip((records[0], records[-1]), steps.losses, strict=True):
        record["loss"] = loss
    return records


if __name__ == "__main__":
    out = Path(sys.argv[3])
    result = train(sys.argv[1], Job.load(sys.argv[2]), out.parent / "trainer")
    if int(os.environ.get("RANK", 0)) == 0:
        out.write_text(json.dumps(result))
