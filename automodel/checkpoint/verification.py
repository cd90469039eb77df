"""See that an exported folder loads to the model that it was made from, before it gets its final name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from automodel.checkpoint.reader import some
from automodel.distributed.layers import decoder_layers
from automodel.distributed.wrappers import is_peft_model, reshard, unwrap
from automodel.types import RunError

_NUM_ROWS, _LENGTH = 2, 16
_TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Sums in another order, on a GPU and a CPU, differ by less; a wrong weight by more."""
_LOW_PRECISION_TOLERANCE = 5e-2
"""bf16 keeps three digits of every activation, and their errors add up over the layers."""


class ExportError(RunError):
    """What was written does not load to the model that was trained."""


@dataclass(frozen=True)
class Probe:
    """What a model computes for a few fixed tokens.

    Attributes:
        logits: [2, 16, V] or [2, num_labels], in float32 on the CPU.
        dtypes: the types in which its layers computed.
    """

    logits: torch.Tensor
    dtypes: set[torch.dtype]


def probe(model: nn.Module, *, device: torch.device | str = "cpu") -> Probe:
    """Run ``model`` on a few fixed tokens, without dropout; nothing of it changes.

    Every rank of a sharded model must call it, and all get the same.
    """
    vocab_size = unwrap(model).config.get_text_config().vocab_size
    tokens = torch.randint(vocab_size, (_NUM_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))
    dtypes: set[torch.dtype] = set()

    def note(_: nn.Module, __: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor):
            dtypes.add(first.dtype)

    hooks = [layer.register_forward_hook(note) for layer in decoder_layers(model)]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens.to(device), use_cache=False).logits
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
        reshard(model)
    return Probe(logits.float().cpu(), dtypes | {logits.dtype})


def verify(
    folder: Path, model: nn.Module, *, expected: Probe, load_base: Callable[[], PreTrainedModel] | None = None
) -> None:
    """Load ``folder`` as a user would and compare its logits with ``expected``; one process calls it.

    Args:
        model: the unwrapped model that the folder was written from, or its twin on the meta device.
        load_base: loads the frozen weights that the adapter in ``folder`` belongs to.

    Raises:
        ExportError: a weight is missing, unknown, or of another shape, or the logits differ.
    """
    if is_peft_model(model):
        assert load_base is not None, "an adapter needs its base to be loaded"
        loaded = _load_adapter(folder, load_base())
    else:
        loaded = _load_model(folder, _plain_class(model))
    compare(probe(loaded), expected=expected)


def compare(got: Probe, *, expected: Probe) -> None:
    """Raise ExportError unless the logits agree, relative to their norm, as far as the precisions allow."""
    tolerance = max(_TOLERANCES.get(dtype, _LOW_PRECISION_TOLERANCE) for dtype in got.dtypes | expected.dtypes)
    if got.logits.shape != expected.logits.shape:
        shapes = f"{list(got.logits.shape)} instead of {list(expected.logits.shape)}"
        raise ExportError(f"the written model gives logits of shape {shapes}")
    if not got.logits.isfinite().all():
        raise ExportError("the written model gives logits that are not finite: do the weights fit the chosen dtype?")
    difference = torch.linalg.vector_norm(got.logits - expected.logits) / torch.linalg.vector_norm(expected.logits)
    if not difference <= tolerance:
        raise ExportError(
            f"the written model does not compute what the trained one does: its logits differ by {difference:.1e} of "
            f"their norm, and at most {tolerance:g} is rounding"
        )


def _plain_class(model: nn.Module) -> type[PreTrainedModel]:
    """Return the model's class of transformers, in whose place FSDP2 puts one of its own."""
    return next(each for each in type(model).__mro__ if not issubclass(each, FSDPModule))


def _load_model(folder: Path, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    try:
        model, report = model_class.from_pretrained(
            folder, dtype="auto", use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ExportError(f"the written model cannot be loaded: {error}") from error
    kinds = {
        "missing from": report["missing_keys"],
        "unknown to the model in": report["unexpected_keys"],
        "of another shape in": [key[0] for key in report["mismatched_keys"]],
    }
    problems = [
        f"{len(keys)} weights are {what} the files: {some(sorted(keys))}" for what, keys in kinds.items() if keys
    ]
    if problems:
        raise ExportError("the written model does not load: " + "; ".join(problems))
    return model


def _load_adapter(folder: Path, base: PreTrainedModel) -> nn.Module:
    from peft import PeftModel, get_peft_model_state_dict

    model = PeftModel.from_pretrained(base, folder)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        written = set(file.keys())
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    problems = [
        f"{len(names)} weights are {what}: {some(sorted(names))}"
        for names, what in ((expected - written, "missing from it"), (written - expected, "unknown to the model"))
        if names
    ]
    if problems:
        raise ExportError("the written adapter does not load: " + "; ".join(problems))
    return model
