"""Check what ``peft`` asks for before anything is loaded; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from automodel.config.names import did_you_mean
from automodel.models.adapter_files import config_problems

if TYPE_CHECKING:
    from automodel.config import Config

_STARTS = ("gaussian", "orthogonal", "olora", "pissa", "pissa_niter_16")
_NO_STARTS = {
    "loftq": "starts at the error of weights that it rounds itself, and bitsandbytes rounds them otherwise",
    "eva": "needs rows of the data before training",
    "corda": "needs rows of the data before training",
    "lora_ga": "needs gradients before training",
    "mica": "freezes one of the two matrices",
    "False": "starts with random matrices, which change what the model computes",
}


def starts_at_factors(init_lora_weights: bool | str) -> bool:
    """Return whether adapters start at factors of the weights, which are subtracted from the frozen ones."""
    return str(init_lora_weights).startswith(("pissa", "olora"))


def adapter_problems(section: dict[str, Any], cfg: Config) -> Iterator[str]:
    """Yield a line for each mistake in the section ``peft`` of a LoRA; see ``config/targets.py``."""
    if section.get("use_dora") and cfg.distributed.get("tp_size", 1) != 1:
        yield "peft.use_dora=true needs the norms of whole weights, which distributed.tp_size splits: use peft=lora"
    yield from _start_problems(section, cfg)
    yield from _parameter_problems(section, cfg)
    yield from _quantization_problems(section, cfg)
    if section.get("init_from") is not None:
        yield from config_problems(section)


def _start_problems(section: dict[str, Any], cfg: Config) -> Iterator[str]:
    start = section.get("init_lora_weights", True)
    what = f"peft.init_lora_weights={str(start).lower() if isinstance(start, bool) else start}"
    if start is True:
        return
    if section.get("init_from") is not None:
        yield f"peft.init_from starts at the weights of another adapter, and {what} elsewhere: leave one of them out"
    if str(start) in _NO_STARTS:
        yield f"{what} {_NO_STARTS[str(start)]}; there are: true, {', '.join(_STARTS)}"
    elif start not in _STARTS and not re.fullmatch(r"pissa_niter_\d+", start):
        yield f"{what}: no such start; there are: true, {', '.join(_STARTS)}{did_you_mean(start, _STARTS)}"
    if start == "orthogonal" and section.get("rank", 2) % 2:
        yield f"{what} needs an even peft.rank, not {section['rank']}"
    if not starts_at_factors(start):
        return
    if section.get("use_dora"):
        yield f"{what} cannot be written as an adapter of the original weights with peft.use_dora=true: use peft=lora"
    if section.get("quantization"):
        yield f"{what} needs whole weights, and peft.quantization rounds them: leave one of them out"
    if cfg.distributed.get("_target_") == "automodel.distributed.MegatronFSDP":
        yield f"{what} changes frozen weights when a run resumes, which distributed=megatron_fsdp keeps: use fsdp2"


def _parameter_problems(section: dict[str, Any], cfg: Config) -> Iterator[str]:
    if not section.get("target_parameters"):
        return
    what = "peft.target_parameters adapts weights that no module of their own applies"
    if section.get("dropout"):
        yield f"{what}, so there is no input to drop: set peft.dropout=0"
    if section.get("use_dora"):
        yield f"{what}, and DoRA needs a module: use peft=lora"
    if section.get("init_lora_weights", True) not in (True, "gaussian"):
        yield f"{what}, and peft.init_lora_weights={section['init_lora_weights']} needs a module: leave it true"
    if section.get("quantization"):
        yield f"{what}, and peft.quantization quantizes modules alone: use peft=lora"
    if cfg.distributed.get("tp_size", 1) != 1:
        yield f"{what}, and distributed.tp_size splits modules alone: set it to 1"


def _quantization_problems(section: dict[str, Any], cfg: Config) -> Iterator[str]:
    kind = section.get("quantization")
    if kind is None:
        return
    what = f"peft.quantization={kind} (peft=qlora)"
    if find_spec("bitsandbytes") is None:
        yield (
            f"{what} needs a CUDA device and the package bitsandbytes, which is not installed: pip install "
            "'automodel[qlora]'; peft=lora needs neither"
        )
    if cfg.model.get("_target_") != "automodel.models.hf.HFModel":
        yield f"{what} quantizes pretrained weights as they are loaded: choose model=hf"
    if cfg.distributed.get("_target_") != "automodel.distributed.DDP":
        yield (
            f"{what} holds 4-bit weights in a layout that cannot be sharded, so every rank needs them whole: choose "
            "distributed=ddp, or peft=lora"
        )
