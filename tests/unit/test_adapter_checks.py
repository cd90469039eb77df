"""What ``peft`` cannot do is refused before anything is loaded, and the error says what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from automodel.config import load_config
from automodel.models import adapter_checks
from automodel.models.adapters import LoRA
from automodel.models.hf import HFModel
from automodel.tasks.causal_lm import CausalLM
from automodel.types import UserError

BASE = ["model=hf", "model.pretrained_model_name_or_path=a/b", "dataset=jsonl", "dataset.path=pyproject.toml"]
TWO = ["launch.nproc_per_node=2", "step_scheduler.global_batch_size=16"]
ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_dora": False}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)


@pytest.fixture
def with_bitsandbytes(monkeypatch):
    monkeypatch.setattr(adapter_checks, "find_spec", lambda name: SimpleNamespace(name=name))


def problems_of(*argv: str) -> list[str]:
    try:
        load_config([*BASE, *argv], env={})
    except UserError as error:
        return list(error.problems)
    return []


def test_quantization_without_the_package_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(adapter_checks, "find_spec", lambda name: None)
    (told,) = problems_of("peft=qlora")
    assert told.startswith("peft.quantization=nf4 (peft=qlora) needs a CUDA device and the package bitsandbytes, which")


@pytest.mark.parametrize(
    ("argv", "messages"),
    [
        ([], []),
        (["peft.quantization=fp4", "peft.double_quantization=false", "peft.compute_dtype=float16"], []),
        (["peft.quantization=int8"], ["peft.quantization=int8 must be one of nf4 or fp4"]),
        (["distributed=fsdp2"], ["cannot be sharded, so every rank needs them whole: choose distributed=ddp"]),
        (["peft.init_lora_weights=pissa"], ["needs whole weights, and peft.quantization rounds them"]),
        (["peft.target_parameters=[experts.down_proj]"], ["peft.quantization quantizes modules alone"]),
    ],
    ids=" ".join,
)
def test_quantization_and_what_goes_with_it(with_bitsandbytes, argv, messages):
    told = problems_of("peft=qlora", *argv)
    assert len(told) == len(messages) and all(each in line for each, line in zip(messages, told, strict=True)), told


def test_quantization_without_a_cuda_device_is_refused_before_the_rows_are_read(with_bitsandbytes):
    from automodel.runner.job import Job

    cfg = load_config([*BASE, "peft=qlora"], env={})
    with pytest.raises(UserError, match=r"peft=qlora\) needs a CUDA device, and this run has cpu alone"):
        Job(cfg, SimpleNamespace(device=torch.device("cpu")))


def test_the_quantization_reaches_the_loading(monkeypatch, stories):
    given: dict[str, Any] = {}

    def from_pretrained(path: str, **options: Any) -> tuple[Any, dict[str, Any]]:
        given.update(options)
        raise ValueError("nothing is loaded here")

    auto_class = SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setattr(CausalLM, "auto_class", lambda self: auto_class)
    monkeypatch.setattr(CausalLM, "configure", lambda *_: None)
    adapters = LoRA(quantization="nf4")
    with pytest.raises(UserError, match="nothing is loaded here"):
        HFModel(str(stories), dtype="bfloat16").build(None, task=CausalLM(), **adapters.loading_options())
    config = given["quantization_config"]
    assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4" and config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype is torch.bfloat16 and given["dtype"] is torch.bfloat16
    assert LoRA().loading_options() == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["peft.init_lora_weights=pisa"], "peft.init_lora_weights=pisa: no such start; there are: true, gaussian"),
        (
            ["peft.init_lora_weights=eva"],
            "peft.init_lora_weights=eva needs rows of the data before training; there are",
        ),
        (["peft.init_lora_weights=loftq"], "bitsandbytes rounds them otherwise"),
        (["peft.init_lora_weights=false"], "peft.init_lora_weights=false starts with random matrices"),
        (["peft.init_lora_weights=orthogonal", "peft.rank=3"], "needs an even peft.rank, not 3"),
        (["peft.init_lora_weights=pissa", "peft.use_dora=true"], "with peft.use_dora=true: use peft=lora"),
        (["peft.init_lora_weights=olora", "distributed=megatron_fsdp"], "distributed=megatron_fsdp keeps: use fsdp2"),
        (["peft.init_lora_weights=pissa", "peft.init_from=x"], "starts at the weights of another adapter"),
        (["peft.target_parameters=[a.b]", "peft.dropout=0.1"], "set peft.dropout=0"),
        (["peft.target_parameters=[a.b]", "peft.use_dora=true"], "DoRA needs a module"),
        (["peft.target_parameters=[a.b]", "peft.init_lora_weights=olora"], "needs a module: leave it true"),
        (
            ["peft.target_parameters=[a.b]", "distributed=fsdp2", "distributed.tp_size=2", *TWO],
            "distributed.tp_size splits modules alone",
        ),
        (["peft.lr_ratio=0"], "peft.lr_ratio=0 must be more than 0"),
        (["peft.init_from=nowhere"], "peft.init_from=nowhere: there is no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_start_is_refused(argv, message):
    assert any(message in line for line in problems_of("peft=lora", *argv))


@pytest.mark.parametrize("start", ["true", "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_16"])
def test_every_start_is_taken(start):
    assert problems_of("peft=lora", f"peft.init_lora_weights={start}") == []


def adapter(folder: Path, **changes: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER | changes))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


FITS = ["peft.rank=4", "peft.alpha=8"]


@pytest.mark.parametrize(
    ("changes", "argv", "message"),
    [
        ({}, FITS, None),
        ({}, ["peft.alpha=8"], "has 4: set peft.rank=4"),
        ({}, ["peft.rank=4"], "has 8: set peft.alpha=8"),
        ({"use_rslora": True}, FITS, "has true: set peft.use_rslora=true"),
        ({"use_dora": True}, FITS, "has true: set peft.use_dora=true"),
        ({"peft_type": "IA3"}, FITS, "is an adapter of the kind IA3, not LORA"),
        ({"rank_pattern": {"q_proj": 2}}, FITS, "has rank_pattern, which is not supported"),
        ({"bias": "all"}, FITS, "has bias=all, and biases are not trained here"),
        ({"init_lora_weights": "pissa_niter_4"}, FITS, "(init_lora_weights=pissa_niter_4) has changed: convert it"),
        ({"init_lora_weights": "gaussian"}, FITS, None),
    ],
)
def test_another_adapter_is_compared_with_the_keys(tmp_path, changes, argv, message):
    told = problems_of("peft=lora", f"peft.init_from={adapter(tmp_path, **changes)}", *argv)
    assert told == [] if message is None else len(told) == 1 and message in told[0]


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    argv = ["peft=lora", f"peft.init_from={tmp_path}", *FITS]
    assert [line.partition(": ")[2] for line in problems_of(*argv)] == [
        "the folder has no adapter_model.safetensors",
        "adapter_config.json is missing or damaged",
    ]
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    told = problems_of(*argv)
    assert "pickled weights are not loaded" in told[0] and "missing or damaged" in told[1]
