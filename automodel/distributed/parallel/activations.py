"""What becomes of a layer's activations between its forward and its backward: kept, recomputed, or kept on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from automodel.distributed.parallel.layers import decoder_layers
from automodel.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

ActivationCheckpointing = bool | Literal["full", "selective"] | PositiveInt
"""``full`` (or true): every decoder layer is recomputed in the backward; a number n: every nth of them, from the first.

``selective``: every layer keeps the results of matrix products and attention, and recomputes the rest.
"""

_MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm", "_scaled_grouped_mm")
_ATTENTION = ("attention", "attn")
_CHANGE_NO_VALUE = ("TBackward0", "TransposeBackward0", "ViewBackward0", "ToCopyBackward0")


def activation_problems(section: dict[str, Any]) -> Iterator[str]:
    """Yield a line where ``distributed.activation_offload`` does not fit ``activation_checkpointing``."""
    if section.get("activation_offload") and section.get("activation_checkpointing") == "selective":
        yield (
            "distributed.activation_offload=true moves what autograd keeps, and activation_checkpointing=selective "
            "keeps its results elsewhere, on the device: choose activation_checkpointing=full or false"
        )


def enable_activation_checkpointing(
    model: nn.Module, mode: ActivationCheckpointing, *, offload_from: torch.device | None = None
) -> None:
    """Recompute the activations of decoder layers in the backward instead of keeping them, as ``mode`` says.

    It uses the switch that transformers' layers have, so names of modules and parameters stay. It must come before the
    layers are sharded.

    Args:
        offload_from: the device of the activations; what the layers still keep goes to host memory until the backward:
            the inputs of recomputed layers, and everything that the other layers keep.

    Raises:
        UserError: the model has no such switch, or, where ``mode`` is a number, not one for each layer.
    """
    if mode is False and offload_from is None:
        return
    _turn_on(model)
    contexts = {"context_fn": _selective_contexts} if mode == "selective" else {}
    recompute = partial(_checkpoint, use_reentrant=False, **contexts)
    interval = 1 if isinstance(mode, bool | str) else mode
    has_switch = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    layers = decoder_layers(model)
    if (interval > 1) and not all(layer in has_switch for layer in layers):
        raise UserError(
            f"distributed.activation_checkpointing={mode}: the layers of {type(model).__name__} can only be recomputed "
            "all together; choose full"
        )
    places = {id(layer): index for index, layer in enumerate(layers)}
    for module in has_switch:
        is_recomputed = mode is not False and places.get(id(module), 0) % interval == 0
        run = recompute if is_recomputed else _call
        module.gradient_checkpointing = is_recomputed or offload_from is not None
        module._gradient_checkpointing_func = run if offload_from is None else partial(_offloaded, run, offload_from)


def _turn_on(model: nn.Module) -> None:
    # Its second name is that of transformers before 5.23.
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or getattr(model, "gradient_checkpointing_enable", None)
    try:
        if enable is None:
            raise ValueError(f"{type(model).__name__} has no method gradient_checkpointing_enable")
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"distributed.activation_checkpointing and activation_offload need a model that supports them: {error}"
        ) from error


def _checkpoint(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(function, *args, **options)


def _call(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def _offloaded(run: Callable[..., Any], device: torch.device, function: Callable[..., Any], *args: Any) -> Any:
    """Call ``run(function, *args)`` and keep what its backward needs in host memory."""
    from torch.autograd.graph import saved_tensors_hooks

    with saved_tensors_hooks(partial(_to_host, device), _from_host):
        return run(function, *args)


def _to_host(device: torch.device, tensor: torch.Tensor) -> Any:
    """Return an activation's copy in host memory and its device; a weight stays where it is.

    The copies are enqueued in the stream that computes, so its order keeps them right, and the host never waits.
    """
    import torch

    if tensor.device.type != device.type or _is_weight(tensor):
        return tensor
    copy = torch.empty_like(tensor, device="cpu", pin_memory=device.type not in ("cpu", "mps"))
    return copy.copy_(tensor, non_blocking=True), tensor.device


def _is_weight(tensor: torch.Tensor) -> bool:
    """Return whether ``tensor`` is a weight, or a weight that was transposed or converted by autocast."""
    if tensor.grad_fn is None:
        return tensor.requires_grad and tensor.is_leaf
    node = tensor.grad_fn
    while node is not None and node.name() in _CHANGE_NO_VALUE:
        node = node.next_functions[0][0]
    return node is not None and node.name().endswith("AccumulateGrad")


def _from_host(packed: Any) -> torch.Tensor:
    return packed[0].to(packed[1], non_blocking=True) if isinstance(packed, tuple) else packed


def _selective_contexts() -> tuple[Any, Any]:
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    return create_selective_checkpoint_contexts(saved_or_recomputed)


def saved_or_recomputed(context: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Return torch's CheckpointPolicy: matrix products and attention are saved, all else is recomputed.

    Attention with dropout is recomputed too: leaving it out would draw fewer random numbers in the backward than in
    the forward, so the masks of any later dropout of the layer would be others.
    """
    from torch.utils.checkpoint import CheckpointPolicy

    name = operation.name().rpartition("::")[2].partition(".")[0]
    is_costly = name in _MATRIX_PRODUCTS or any(word in name for word in _ATTENTION)
    if is_costly and not _drops_out(operation, args, kwargs):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _drops_out(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    schema = getattr(operation, "_schema", None)
    names = [] if schema is None else [argument.name for argument in schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return any(given.get(name) for name in ("dropout_p", "dropout"))
