"""The main job on a real model and real rows, in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipes.command import command_line, records, run

LAYOUTS = {
    "one process": [],
    "ddp on 2": ["launch.nproc_per_node=2"],
    "fsdp2 on 2": ["launch.nproc_per_node=2", "distributed=fsdp2"],
}


@pytest.fixture(scope="module")
def base(shared_data: Path, stories: Path) -> list[str]:
    return [
        "model=hf", f"model.pretrained_model_name_or_path={stories}", "dataset=jsonl",
        f"dataset.path={shared_data}/sft/gsm8k_train.jsonl", "dataset.limit=200", "dataset.max_length=96",
        "dataset.truncation=left",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def runs(base: list[str], shared_data: Path, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    out = {}
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        out[name] = folder / str(number)
        train = run if layout else command_line
        train(
            *base, "recipe=llm_sft", "dataset.columns.prompt=question", "dataset.columns.completion=answer",
            "validation_dataset=jsonl", "evaluation=generation",
            f"validation_dataset.path={shared_data}/sft/gsm8k_test.jsonl", "validation_dataset.limit=9",
            "evaluation.max_new_tokens=6", "evaluation.batch_size=2", "step_scheduler.max_steps=10",
            "step_scheduler.val_every_steps=null",
            f"output_dir={out[name]}", *layout,
        )  # fmt: skip
    return out


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_every_step_is_the_same_as_in_one_process(runs, layout):
    expected, got = records(runs["one process"]), records(runs[layout])
    assert [record["step"] for record in got] == list(range(1, 11))
    for one, other in zip(expected, got, strict=True):
        # float32 sums in another order, over ten steps of AdamW
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
        for key in ("lr", "epoch", "num_label_tokens", "num_tokens"):
            assert other[key] == one[key]


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_validation_does_not_depend_on_the_layout(runs, layout):
    expected, got = records(runs["one process"], "validation"), records(runs[layout], "validation")
    assert [record["step"] for record in got] == [0, 10]
    for one, other in zip(expected, got, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert other["num_label_tokens"] == one["num_label_tokens"]
        assert other["metric/exact_match"] == one["metric/exact_match"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_exported_model_loads_and_generates(runs, layout):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = runs[layout] / "model"
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert model.config.architectures == ["LlamaForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
    assert "Once upon a time" in text and len(text) > len("<s> Once upon a time") + 5


def test_the_exported_weights_are_those_that_were_trained(runs, stories):
    import torch
    from safetensors.torch import load_file

    start = load_file(stories / "model.safetensors")
    models = [load_file(runs[layout] / "model" / "model.safetensors") for layout in LAYOUTS]
    for name, weight in models[0].items():
        assert not torch.equal(weight, start[name])
        for other in models[1:]:
            torch.testing.assert_close(other[name], weight, rtol=1e-4, atol=1e-6)


def test_run_json_says_what_ran(runs):
    record = json.loads((runs["fsdp2 on 2"] / "run.json").read_text())
    assert (record["world_size"], record["backend"], record["device"], record["strategy"]) == (
        2,
        "gloo",
        "cpu",
        "fsdp2",
    )
    assert record["num_parameters"] == 260_032
    assert record["resumed_from_step"] == [None]
    assert record["ended"]["status"] == "done"


OPTIONS = {
    "bf16 ddp": ["distributed.mixed_precision=bf16"],
    "bf16 fsdp2": ["distributed=fsdp2", "distributed.mixed_precision=bf16"],
    "recompute ddp": ["distributed.activation_checkpointing=true"],
    "recompute fsdp2": [
        "distributed=fsdp2",
        "distributed.activation_checkpointing=true",
        "distributed.cpu_offload=true",
    ],
    "keep gathered": [
        "distributed=fsdp2",
        "distributed.reshard_after_forward=false",
        "distributed.defer_grad_sync=false",
    ],
    "replicas": ["distributed=fsdp2", "distributed.dp_replicate_size=2"],
    "tensor parallel": ["distributed=fsdp2", "distributed.tp_size=2", "distributed.sequence_parallel=true"],
    "tensor parallel, all at once": [
        "distributed=fsdp2",
        "distributed.tp_size=2",
        "distributed.cpu_offload=true",
        "distributed.activation_checkpointing=true",
    ],
    "prefetch": ["distributed=fsdp2", "distributed.num_prefetched_layers=2", "optimizer=sgd"],
    "workers and sgd": [
        "dataloader.num_workers=2",
        "optimizer=sgd",
        "lr_scheduler=linear",
        "clip_grad_norm.max_norm=null",
    ],
    "pure bf16": ["distributed=fsdp2", "distributed.mixed_precision=pure_bf16"],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_of_a_strategy_trains(runs, base, tmp_path, name):
    run(
        *base, "step_scheduler.max_steps=3", "optimizer.lr=1e-5",
        "launch.nproc_per_node=2", f"output_dir={tmp_path}/run", *OPTIONS[name],
    )  # fmt: skip
    # bf16 keeps about three digits; all else is the same computation
    tolerance = 2e-2 if "bf16" in name else 1e-5
    first, expected = records(tmp_path / "run")[0], records(runs["one process"])[0]
    assert first["loss"] == pytest.approx(expected["loss"], rel=tolerance)
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5 * tolerance)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_the_model_of_a_run_in_bf16_is_trained_in_float32_and_written_in_bf16(base, stories, tmp_path, layout):
    import torch
    from safetensors.torch import load_file

    from automodel.checkpoint.weight_reader import WeightReader

    output = run(
        *base, "step_scheduler.max_steps=3", f"distributed={layout}", "model.dtype=bfloat16",
        "launch.nproc_per_node=2", f"output_dir={tmp_path}/run",
    )  # fmt: skip
    assert "trained weights float32, computing bfloat16, model/ bfloat16" in output
    written = load_file(tmp_path / "run" / "model" / "model.safetensors")
    trained = WeightReader(tmp_path / "run" / "checkpoints" / "latest")
    num_unchanged = num_weights = 0
    for name, start in load_file(stories / "model.safetensors").items():
        weight = trained.read(name)
        assert (weight.dtype, written[name].dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(written[name], weight.to(torch.bfloat16))
        num_unchanged += int((weight == start).sum())
        num_weights += start.numel()
    assert num_unchanged / num_weights < 0.05  # of bf16 weights, 97 % stay as they are
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["dtype"] == "bfloat16"
