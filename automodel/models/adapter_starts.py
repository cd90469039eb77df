"""Adapters that start at factors of the weights (PiSSA, OLoRA), which are subtracted from the frozen ones.

With s the scale of the adapters, W a weight of the files, and A0, B0 the factors at the start, the model computes with

    (W - s B0 A0) + s B A  =  W + s [B, -B0] [A; A0]

so what is written is a plain adapter of twice the rank on W. A0 and B0 are buffers of the layers, and part of
checkpoints: a resumed run subtracts those that it began with, also where its own would come out otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from automodel.checkpoint.weight_reader import WeightReader
from automodel.distributed.runtime.agreement import run_on_main
from automodel.types import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import Linear

_ADAPTER = "default"
_STARTS = {f"lora_A.{_ADAPTER}.weight": "start_A", f"lora_B.{_ADAPTER}.weight": "start_B"}
"""The buffer beside each trained matrix, by the end of its name."""


def start_at_factors(model: PeftModel, init_lora_weights: str) -> None:
    """Set the adapters of ``model`` to factors of the weights and subtract these; every rank must call it.

    Rank 0 computes them, since other processors may choose other signs. What the model computes stays the same.

    Args:
        model: whole on the host.

    Raises:
        UserError: an adapter is on something else than a linear layer, or has too high a rank.
    """
    layers = _adapted_layers(model)
    what = f"peft.init_lora_weights={init_lora_weights}"
    for name, layer in layers.items():
        _require_linear(what, name, layer)
    for layer in layers.values():
        factors = run_on_main(lambda layer=layer: _factors(layer, init_lora_weights))
        for trained, buffer, value in zip((layer.lora_A, layer.lora_B), _STARTS.values(), factors, strict=True):
            trained[_ADAPTER].weight.data = value.clone()
            layer.register_buffer(buffer, value)
        weight = layer.get_base_layer().weight
        weight.data = (weight.data.float() - layer.get_delta_weight(_ADAPTER).float()).to(weight.dtype)
    config = model.peft_config[_ADAPTER]  # which is only written from now on, with the weights of as_plain_adapter
    config.r, config.lora_alpha = plain_shape(config.r, config.lora_alpha, use_rslora=config.use_rslora)


def plain_shape(rank: int, alpha: float, *, use_rslora: bool) -> tuple[int, float]:
    """Return rank and alpha of the plain adapter, whose scale is the same."""
    return 2 * rank, alpha * (2**0.5 if use_rslora else 2)


def as_plain_adapter(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of the plain adapter on the weights of the files; others are returned unchanged.

    Args:
        weights: whole, by name, the buffers of the start among them.
    """
    starts = tuple(_STARTS.values())
    return {
        name: _joined(name, weight, weights.get(_start_of(name)))
        for name, weight in weights.items()
        if not name.endswith(starts)
    }


class PlainAdapterReader:
    """Reads the weights of a checkpoint like a ``WeightReader``, as ``as_plain_adapter`` gives them."""

    def __init__(self, reader: WeightReader) -> None:
        self._reader = reader
        described = {name: torch.empty(shape, device="meta") for name, shape in reader.shapes.items()}
        self.shapes = {name: tuple(weight.shape) for name, weight in as_plain_adapter(described).items()}
        self.dtypes = {name: reader.dtypes[name] for name in self.shapes}

    def read(self, name: str) -> torch.Tensor:
        """Return one whole weight on the CPU."""
        start = _start_of(name)
        has_start = start in self._reader.shapes
        return _joined(name, self._reader.read(name), self._reader.read(start) if has_start else None)


def starts_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a copy of the factors at the start, by name; empty for other models."""
    ends = tuple(_STARTS.values())
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(ends)}


@torch.no_grad()
def follow_starts(model: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    """Subtract from the frozen weights the factors that a checkpoint has brought, instead of those ``before``.

    Nothing happens to the last bit where both are the same; no rank waits for another.

    Args:
        model: perhaps sharded, with the checkpoint's buffers.
        before: what ``starts_of`` gave before the checkpoint was loaded.
    """
    now = starts_of(model)
    for name in (name for name in now if name.endswith("start_A")):
        names = (name, name.removesuffix("start_A") + "start_B")
        if all(torch.equal(now[each], before[each]) for each in names):
            continue
        layer = model.get_submodule(name.rpartition(".")[0])
        (a_before, b_before), (a_now, b_now) = ([found[each] for each in names] for found in (before, now))
        delta = layer.scaling[_ADAPTER] * (b_before @ a_before - b_now @ a_now)
        _add(layer.get_base_layer().weight, delta)


def _adapted_layers(model: PeftModel) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}


def _require_linear(what: str, name: str, layer: Any) -> None:
    from peft.tuners.lora import Linear

    if not isinstance(layer, Linear) or not isinstance(layer.get_base_layer(), nn.Linear):
        raise UserError(f"{what} is for linear layers alone, and {name} is a {type(layer.get_base_layer()).__name__}")
    rank, most = layer.r[_ADAPTER], min(layer.in_features, layer.out_features)
    if rank > most:
        raise UserError(f"{what}: peft.rank={rank} is more than {name} has factors: {most}")


def _factors(layer: Linear, init_lora_weights: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A0 [rank, in] and B0 [out, rank] in float32, by PEFT's functions; the weight is left unchanged."""
    weight = layer.get_base_layer().weight
    kept = weight.data.clone()
    if init_lora_weights == "olora":
        layer.olora_init(_ADAPTER)
    else:
        layer.pissa_init(_ADAPTER, init_lora_weights)
    weight.data = kept
    return tuple(each[_ADAPTER].weight.detach().float().contiguous() for each in (layer.lora_A, layer.lora_B))


def _start_of(name: str) -> str:
    """Return the name of the buffer beside a trained matrix; "" where there can be none."""
    return next((name.removesuffix(end) + buffer for end, buffer in _STARTS.items() if name.endswith(f".{end}")), "")


def _joined(name: str, weight: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
    if start is None:
        return weight
    start = start.to(weight.dtype)
    return torch.cat([weight, start], dim=0) if "lora_A" in name else torch.cat([weight, -start], dim=1)


def _add(weight: torch.Tensor, whole: torch.Tensor) -> None:
    """Add ``whole`` to a weight, or to the part of it that is this rank's."""
    if isinstance(weight, DTensor):
        shape, offsets = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
        whole = whole[tuple(slice(first, first + size) for first, size in zip(offsets, shape, strict=True))]
        weight = weight.to_local()
    weight.copy_(weight.float() + whole.to(weight.device))
