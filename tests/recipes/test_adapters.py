"""LoRA and DoRA from the command line: the same in every layout, and an adapter that PEFT loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.nn import functional as F

from automodel.data.sources import FileDataset
from tests.recipes.command import command_line, load_as_the_screen_says, records, run
from tests.unit.rows import load_sft

ONE = "one process"
LAYOUTS = {
    ONE: [],
    "fsdp2": ["launch.nproc_per_node=2", "distributed=fsdp2"],
    "tensor parallel": ["launch.nproc_per_node=2", "distributed=fsdp2", "distributed.tp_size=2",
                        "distributed.sequence_parallel=true"],
    "ddp, classifier head kept": ["launch.nproc_per_node=2", "peft.modules_to_save=[lm_head]"],
    "dora": ["peft=dora"],
    "dora, fsdp2": ["peft=dora", "launch.nproc_per_node=2", "distributed=fsdp2"],
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(shared_data: Path, stories: Path, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    out = {}
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        out[name] = folder / str(number)
        train = run if layout else command_line
        train(
            "model=hf", f"model.pretrained_model_name_or_path={stories}", "peft=lora", "peft.rank=4", "dataset=jsonl",
            f"dataset.path={shared_data}/sft/gsm8k_train.jsonl", "dataset.max_length=96", "optimizer.lr=1e-2",
            "validation_dataset=jsonl", f"validation_dataset.path={shared_data}/sft/gsm8k_test.jsonl",
            "validation_dataset.limit=5", "validation_dataset.max_length=96", "step_scheduler.max_steps=4",
            "evaluation=generation", "evaluation.max_new_tokens=4", "step_scheduler.global_batch_size=8",
            "step_scheduler.local_batch_size=4", "step_scheduler.val_every_steps=null",
            f"output_dir={out[name]}", *layout,
        )  # fmt: skip
    return out


@pytest.mark.parametrize(("layout", "alike"), [("fsdp2", ONE), ("tensor parallel", ONE), ("dora, fsdp2", "dora")])
def test_every_step_is_the_same_as_in_one_process(runs, layout, alike):
    for kind in ("train", "validation"):
        for one, other in zip(records(runs[alike], kind), records(runs[layout], kind), strict=True):
            for key in ("loss", "grad_norm") if kind == "train" else ("loss",):
                assert other[key] == pytest.approx(one[key], rel=1e-5)


def test_the_last_words_load_the_adapter(runs):
    assert type(load_as_the_screen_says(runs[ONE])).__name__ == "PeftModelForCausalLM"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_adapter_that_peft_loads_has_the_validation_loss_of_the_run(runs, layout, stories, shared_data):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = runs[layout] / "model"
    base = AutoModelForCausalLM.from_pretrained(stories)
    model = PeftModel.from_pretrained(base, folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first, last = records(runs[layout], "validation")[0], records(runs[layout], "validation")[-1]
    source = FileDataset(path=str(shared_data / "sft" / "gsm8k_test.jsonl"), limit=5, max_length=96)
    loss_sum, count = 0.0, 0
    for example in load_sft(source, tokenizer, model_max_length=512).examples:
        labels = torch.tensor(example["labels"])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([list(example["input_ids"])])).logits[0]
        loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    assert count == last["num_label_tokens"]
    assert loss_sum / count == pytest.approx(last["loss"], rel=1e-5)
    assert abs(last["loss"] - first["loss"]) > 1e-3  # the adapter does something


def test_only_the_adapter_is_trained_saved_and_exported(runs):
    record = json.loads((runs[ONE] / "run.json").read_text())
    assert record["num_trained_parameters"] < record["num_parameters"] / 5
    assert {path.name for path in (runs[ONE] / "model").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    saved = FileSystemReader(runs[ONE] / "checkpoints" / "latest").read_metadata().state_dict_metadata
    weights = [name for name in saved if name.startswith("model.")]
    assert weights and all("lora_" in name for name in weights)


def test_a_run_with_adapters_goes_on_in_another_layout(runs, shared_data, stories):
    output = run(
        "model=hf", f"model.pretrained_model_name_or_path={stories}", "peft=lora", "peft.rank=4", "dataset=jsonl",
        f"dataset.path={shared_data}/sft/gsm8k_train.jsonl", "dataset.max_length=96", "optimizer.lr=1e-2",
        "step_scheduler.max_steps=5", "step_scheduler.global_batch_size=8",
        f"output_dir={runs['tensor parallel']}", *LAYOUTS["fsdp2"],
    )  # fmt: skip
    assert "resumed from" in output
    assert [record["step"] for record in records(runs["tensor parallel"])] == [1, 2, 3, 4, 5]


def test_modules_that_are_not_there_are_told(shared_data, stories, tmp_path):
    output = run(
        "model=hf", f"model.pretrained_model_name_or_path={stories}", "peft=lora", "peft.target_modules=[nowhere]",
        "dataset=jsonl", f"dataset.path={shared_data}/sft/gsm8k_train.jsonl", f"output_dir={tmp_path}/run", status=2,
    )  # fmt: skip
    assert "peft.target_modules=['nowhere']" in output and "Traceback" not in output
