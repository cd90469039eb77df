"""Check that an exported folder loads as the model it was written from, before it gets its final name."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from automodel.checkpoint.weight_reader import first_few
from automodel.distributed.parallel.handle import handle_of
from automodel.distributed.parallel.layers import decoder_layers, is_peft_model
from automodel.types import RunError

_NUM_ROWS, _LENGTH = 2, 16
_FLOAT32_TOLERANCE = 1e-3
"""GPU and CPU add in different orders: their results differ by less; a wrong weight makes more difference."""
_HOST_ATTENTION = ("eager", "sdpa")
"""Implementations that run on a CPU; flash, flex and hub kernels may not."""

Digests = dict[str, tuple[torch.dtype, int]]
"""The dtype of each weight and the checksum of its bytes, by name."""


class ExportError(RunError):
    """The written files do not load as the trained model."""


@dataclass(frozen=True)
class Probe:
    """What a model computes for a few fixed tokens.

    Attributes:
        logits: [2, 16, V] or [2, num_labels], in float32 on the CPU.
        tolerance: the largest distance to the logits of a copy, relative to their norm. It follows from the precision
            and the number of layers, whose rounding errors add up like a random walk. The distance measured in bf16
            for 2, 8 and 32 layers is a quarter of it.
    """

    logits: torch.Tensor
    tolerance: float


def probe(
    model: nn.Module,
    *,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Probe:
    """Run ``model`` on a few fixed tokens, without dropout; the model is left unchanged.

    Every rank of a sharded model must call it, and all get the same result.

    Args:
        autocast: makes the autocast context of training.
    """
    handle = handle_of(model)
    vocab_size = handle.plain_model.config.get_text_config().vocab_size
    tokens = torch.randint(vocab_size, (_NUM_ROWS, _LENGTH), generator=torch.Generator().manual_seed(0))
    dtypes: set[torch.dtype] = set()

    def note(_: nn.Module, __: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor):
            dtypes.add(first.dtype)

    layers = decoder_layers(model)
    hooks = [layer.register_forward_hook(note) for layer in layers]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast():
            device_type = torch.device(device).type
            if torch.is_autocast_enabled(device_type):
                dtypes.add(torch.get_autocast_dtype(device_type))
            logits = model(input_ids=tokens.to(device), use_cache=False).logits
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
        handle.reshard()
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes | {logits.dtype} if dtype.is_floating_point)
    return Probe(logits.float().cpu(), max(_FLOAT32_TOLERANCE, coarsest * (2 + len(layers) ** 0.5)))


def digests_of(weights: Mapping[str, torch.Tensor]) -> Digests:
    """Return the digests of weights in host memory."""
    return {name: (weight.dtype, _checksum(weight)) for name, weight in weights.items()}


def verify(
    folder: Path,
    model: nn.Module,
    *,
    expected: Probe,
    digests: Digests,
    load_base: Callable[[], PreTrainedModel] | None = None,
) -> None:
    """Load ``folder`` on the CPU as a user would and compare weights and logits; only one process calls it.

    An adapter is loaded where ``load_base`` puts its base.

    Args:
        model: the unwrapped model that the folder was written from, or its twin on the meta device.
        digests: of the written weights, by their names in ``model``. They reveal any wrong weight in any precision;
            the logits reveal a wrong configuration.
        load_base: loads the frozen weights that the adapter in ``folder`` belongs to.

    Raises:
        ExportError: a weight is missing, unknown or different, or the logits differ.
    """
    if is_peft_model(model):
        assert load_base is not None, "an adapter needs its base to be loaded"
        base = load_base()
        use_host_attention(base)
        loaded = _load_adapter(folder, base)
    else:
        loaded = _load_model(folder, handle_of(model).plain_class)
        use_host_attention(loaded)
    _compare_weights(loaded.state_dict(), digests)
    compare(probe(loaded, device=next(loaded.parameters()).device), expected=expected)


def use_host_attention(model: PreTrainedModel) -> None:
    """Switch a model on the CPU to an attention implementation that runs there."""
    if model.config._attn_implementation not in _HOST_ATTENTION:
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")


def compare(got: Probe, *, expected: Probe) -> None:
    """Raise ExportError unless the logits of three in four tokens agree within rounding, relative to their norm.

    The rest may differ in a mixture of experts, where a close routing decision can change with the device.
    """
    tolerance = max(got.tolerance, expected.tolerance)
    if got.logits.shape != expected.logits.shape:
        shapes = f"{list(got.logits.shape)} instead of {list(expected.logits.shape)}"
        raise ExportError(f"the written model gives logits of shape {shapes}")
    if not expected.logits.isfinite().all():
        raise ExportError("the trained model gives logits that are not finite: nothing can be compared with it")
    if not got.logits.isfinite().all():
        raise ExportError("the written model gives logits that are not finite: do the weights fit the chosen dtype?")
    norms = torch.linalg.vector_norm(expected.logits, dim=-1)
    differences = torch.linalg.vector_norm(got.logits - expected.logits, dim=-1) / norms
    typical = differences.quantile(0.75)
    if not typical <= tolerance:
        raise ExportError(
            f"the written model does not compute the same as the trained one: at a quarter of the tokens or more its "
            f"logits differ by {typical:.1e} of their norm, and rounding explains at most {tolerance:.1g}"
        )


def _compare_weights(loaded: Mapping[str, torch.Tensor], digests: Digests) -> None:
    """Raise ExportError if a loaded weight is not the written one; the logits check weights of another dtype."""
    others = [
        name
        for name, (dtype, checksum) in digests.items()
        if name in loaded and loaded[name].dtype == dtype and _checksum(loaded[name]) != checksum
    ]
    if others:
        raise ExportError(
            f"{len(others)} weights of the written model are not the trained ones: {first_few(sorted(others))}"
        )


def _checksum(weight: torch.Tensor) -> int:
    return zlib.crc32(weight.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())


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
        f"{len(keys)} weights are {what} the files: {first_few(sorted(keys))}" for what, keys in kinds.items() if keys
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
        f"{len(names)} weights are {what}: {first_few(sorted(names))}"
        for names, what in ((expected - written, "missing from it"), (written - expected, "unknown to the model"))
        if names
    ]
    if problems:
        raise ExportError("the written adapter does not load: " + "; ".join(problems))
    return model
