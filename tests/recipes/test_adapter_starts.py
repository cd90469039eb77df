"""Runs whose adapters start elsewhere, learn at two rates, or adapt fused experts: resumed, exported and continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from automodel.models.char_tokenizer import build_char_tokenizer
from tests.recipes.command import command_line, numbers, records, run

TWO = ["launch.nproc_per_node=2"]
FSDP2 = [*TWO, "distributed=fsdp2"]
PISSA = ["peft.init_lora_weights=pissa", "peft.lr_ratio=4"]


@pytest.fixture(scope="module")
def options(shared_data: Path, stories: Path) -> list[str]:
    return [
        "model=hf", f"model.pretrained_model_name_or_path={stories}", "peft=lora", "peft.rank=4", "dataset=jsonl",
        f"dataset.path={shared_data}/sft/gsm8k_train.jsonl", "dataset.max_length=96", "dataset.truncation=right",
        "optimizer.lr=1e-3", "lr_scheduler=constant", "step_scheduler.global_batch_size=8",
        "step_scheduler.local_batch_size=4", "step_scheduler.val_every_steps=null",
    ]  # fmt: skip


def train(options: list[str], folder: Path, steps: int, *more: str, status: int = 0) -> str:
    argv = [*options, f"step_scheduler.max_steps={steps}", f"output_dir={folder}", *more]
    return run(*argv, status=status)


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory) -> Path:
    """A run with PiSSA and LoRA+ that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(options, folder, 4, *PISSA)
    return folder


def logits_of(folder: Path, base: Path) -> torch.Tensor:
    """Return what the folder, loaded as a stranger would, computes."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    is_adapter = (folder / "adapter_config.json").is_file()
    model = AutoModelForCausalLM.from_pretrained(base if is_adapter else folder)
    model = (PeftModel.from_pretrained(model, folder) if is_adapter else model).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 27).reshape(2, 12)).logits


def test_a_resumed_run_equals_one_that_was_never_stopped(options, whole, tmp_path):
    train(options, tmp_path / "run", 2, *PISSA)
    assert "resumed from" in train(options, tmp_path / "run", 4, *PISSA)
    assert list(map(numbers, records(tmp_path / "run"))) == list(map(numbers, records(whole)))
    got, expected = (load_file(each / "model" / "adapter_model.safetensors") for each in (tmp_path / "run", whole))
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("layout", [TWO, FSDP2], ids=["ddp", "fsdp2"])
def test_every_step_is_the_same_in_another_layout_and_after_a_resume_there(options, whole, tmp_path, layout):
    train(options, tmp_path / "run", 3, *PISSA, *layout)
    train(options, tmp_path / "run", 4, *PISSA, *(TWO if layout is FSDP2 else []))
    for one, other in zip(records(whole), records(tmp_path / "run"), strict=True):
        assert other["lr"] == one["lr"] == 1e-3  # that of the matrices A
        for key in ("loss", "grad_norm"):
            assert other[key] == pytest.approx(one[key], rel=1e-4)


def test_the_export_is_a_plain_adapter_of_twice_the_rank(whole, stories, tmp_path):
    config = json.loads((whole / "model" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 64, True)
    expected = logits_of(whole / "model", stories)
    checkpoint = f"{whole}/checkpoints/latest"
    assert "written and verified" in command_line(checkpoint, f"{tmp_path}/adapter", verb="export")
    command_line(checkpoint, f"{tmp_path}/merged", "export.merge=true", verb="export")
    for name in ("adapter", "merged"):
        got = logits_of(tmp_path / name, stories)
        assert (got - expected).norm() / expected.norm() < 1e-4
    base = logits_of(stories, stories)
    assert (base - expected).norm() / base.norm() > 1e-2  # training did something


def test_the_first_loss_is_that_of_the_base(options, whole, tmp_path):
    train(options, tmp_path / "plain", 1)
    (plain,) = records(tmp_path / "plain")
    first = records(whole)[0]
    assert first["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert first["grad_norm"] != pytest.approx(plain["grad_norm"], rel=0.1)  # both matrices have a gradient


def test_only_what_is_trained_and_its_start_is_in_a_checkpoint(whole):
    saved = FileSystemReader(whole / "checkpoints" / "latest").read_metadata().state_dict_metadata
    weights = {name.removeprefix("model.") for name in saved if name.startswith("model.")}
    ends = {name.partition("_proj.")[2] for name in weights}
    assert ends == {"lora_A.default.weight", "lora_B.default.weight", "start_A", "start_B"}
    states = {name for name in saved if name.startswith("optimizer.state.")}
    assert states and all(".lora_" in name for name in states)


def test_another_start_is_refused_on_resume_and_another_ratio_applies(options, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run", symlinks=True)
    told = train(options, tmp_path / "run", 5, "peft.lr_ratio=4", status=2)
    assert (
        "peft.init_lora_weights is true, but" in told and "the frozen weights under the adapters would differ" in told
    )
    told = train(options, tmp_path / "run", 5, *PISSA, "peft.lr_ratio=2")
    assert "peft.lr_ratio is now 2, and was 4" in told


@pytest.mark.parametrize("layout", [[], TWO, FSDP2], ids=["one process", "ddp", "fsdp2"])
def test_a_run_continues_another_runs_adapter_and_then_its_own(options, whole, stories, shared_data, tmp_path, layout):
    adapter = shutil.copytree(whole / "model", tmp_path / "adapter")
    start = ["peft.rank=8", "peft.alpha=64", f"peft.init_from={adapter}", *layout]
    validated = [
        "validation_dataset=jsonl", f"validation_dataset.path={shared_data}/sft/gsm8k_test.jsonl",
        "validation_dataset.limit=5", "validation_dataset.max_length=96", "step_scheduler.val_every_steps=auto",
    ]  # fmt: skip
    train(options, tmp_path / "run", 2, *start, *validated)
    train(options, tmp_path / "base", 1, *validated)
    first, last = records(tmp_path / "run", "validation")[0], records(tmp_path / "run", "validation")[-1]
    assert first["loss"] < records(tmp_path / "base", "validation")[0]["loss"] - 0.1
    weights = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    shutil.rmtree(adapter)
    told = train(options, tmp_path / "run", 3, *start, status=2)  # the key names a folder that is gone
    assert f"peft.init_from={adapter}: there is no such folder" in told
    assert "resumed from" in train(options, tmp_path / "run", 2, *start, "peft.init_from=null", *validated)
    again = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    assert last["step"] == 2


def test_a_damaged_adapter_is_refused(options, whole, tmp_path):
    adapter = shutil.copytree(whole / "model", tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    told = train(options, tmp_path / "run", 1, "peft.rank=8", "peft.alpha=64", f"peft.init_from={adapter}", status=2)
    assert "adapter_model.safetensors cannot be read, so it is damaged" in told and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    """A tiny mixture of experts whose experts' weights are fused."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    folder = tmp_path_factory.mktemp("experts")
    tokenizer = build_char_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_experts=4,
            num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def test_fused_experts_are_adapted_in_every_layout(experts, tmp_path):
    options = [
        "model=hf", f"model.pretrained_model_name_or_path={experts}", "peft=lora", "peft.rank=4", "dataset=demo",
        "peft.target_parameters=[experts.gate_up_proj,experts.down_proj]", "peft.target_modules=[q_proj]",
        "dataset.limit=100", "validation_dataset=none", "optimizer.lr=1e-2", "lr_scheduler=constant",
        "step_scheduler.global_batch_size=8", "step_scheduler.local_batch_size=4",
    ]  # fmt: skip
    told = train(options, tmp_path / "one", 4)
    assert "adapters on q_proj, down_proj, gate_up_proj; without one, frozen: " in told
    train(options, tmp_path / "fsdp2", 2, *FSDP2)
    train(options, tmp_path / "fsdp2", 4, *FSDP2)
    train(options, tmp_path / "ddp", 4, *TWO)
    for name in ("fsdp2", "ddp"):
        for one, other in zip(records(tmp_path / "one"), records(tmp_path / name), strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    written = load_file(tmp_path / "fsdp2" / "model" / "adapter_model.safetensors")
    trained = [weight for name, weight in written.items() if "experts" in name and "lora_B" in name]
    assert len(trained) == 4 and all(weight.abs().max() > 0 for weight in trained)
    command_line(f"{tmp_path}/fsdp2/checkpoints/latest", f"{tmp_path}/merged", "export.merge=true", verb="export")
    expected = logits_of(tmp_path / "fsdp2" / "model", experts)
    got = logits_of(tmp_path / "merged", experts)
    assert (got - expected).norm() / expected.norm() < 1e-4
    told = train([*options, "peft.target_parameters=[experts.up]"], tmp_path / "wrong", 1, status=2)
    assert "has no weight experts.up outside its linear layers" in told and "experts.gate_up_proj" in told
