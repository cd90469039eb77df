"""The output layer of a causal language model, applied to the supervised positions alone.

A forward of the model runs with a stand-in for its output layer, which receives the hidden states. The loss is then
computed before that forward returns, so under FSDP2 the layer's weights are still gathered, and the wrapper sees the
loss as the model's output.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from automodel.distributed.parallel.handle import unwrap
from automodel.distributed.parallel.layers import is_peft_model
from automodel.losses.chunked import Targets, VocabularyPart, chunk_rows, chunked_loss_sum
from automodel.types import UserError

if TYPE_CHECKING:
    from automodel.losses.cross_entropy import Batch
    from automodel.losses.linear_cross_entropy import LinearCrossEntropy


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the logits after its output layer: ``cap * tanh(scale * logits / cap)``, or the scale alone.

    Gemma 2 caps them, Cohere and Granite scale them.
    """

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the transformed logits."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


@dataclass(frozen=True)
class OutputLayer:
    """The output layer of one model.

    Attributes:
        base: the transformers model inside wrappers and adapters.
        holder: the module that holds the layer as its child ``name``.
        transform: what the model does to logits; None where only its own forward knows.
    """

    base: nn.Module
    holder: nn.Module
    name: str
    transform: LogitTransform | None

    @property
    def module(self) -> nn.Module:
        """The layer itself."""
        return self.holder._modules[self.name]

    def loss_sum(self, model: nn.Module, batch: Batch, loss: LinearCrossEntropy) -> torch.Tensor:
        """Return the loss sum for ``batch``, a float32 scalar, by a forward of ``model``, the wrapped ``base``."""
        layer, targets, forward = self.module, Targets.of(batch), self.base.forward

        def forward_to_loss(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            with _replaced(self.holder, self.name, _Receiver()) as receiver:
                forward(*args, **kwargs)
            return {"loss": self._score(layer, receiver.hidden_of(batch), targets, loss)}

        def forward_to_logits(*args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
            with _replaced(self.holder, self.name, _Selector(layer, batch, targets)):
                logits = forward(*args, **kwargs).logits
            return {"loss": loss.sum_of(logits[0], targets.labels_N, targets.weights_N)}

        with _with_forward(self.base, forward_to_logits if self.transform is None else forward_to_loss):
            return model(**batch.inputs, use_cache=False)["loss"]

    def _score(self, layer: nn.Module, hidden: torch.Tensor, targets: Targets, loss: LinearCrossEntropy) -> Any:
        """Return the loss sum for the hidden states [B, T, D]."""
        hidden_ND = hidden.flatten(0, 1).index_select(0, targets.positions_N)
        weight, part = _plain_weight(layer)
        if weight is not None:
            bias = layer.bias.to_local() if isinstance(layer.bias, DTensor) else layer.bias
            return chunked_loss_sum(hidden_ND, weight, bias, targets, loss=loss, transform=self.transform, part=part)
        return self._score_by_module(layer, hidden_ND, targets, loss)

    def _score_by_module(
        self, layer: nn.Module, hidden_ND: torch.Tensor, targets: Targets, loss: LinearCrossEntropy
    ) -> torch.Tensor:
        """Do it by calls of the layer, whose logits the backward recomputes, for layers such as adapted ones."""

        def score(hidden: torch.Tensor, chunk: Targets) -> torch.Tensor:
            return loss.sum_of(self.transform(layer(hidden)), chunk.labels_N, chunk.weights_N)

        vocab_size = self.base.config.get_text_config().vocab_size
        rows = chunk_rows(len(hidden_ND), vocab_size, loss.chunk_size, hidden_ND.device.type)
        if _has_hooks(layer) or rows >= len(hidden_ND):  # a wrapper's hooks may gather weights and free them
            return score(hidden_ND, targets)
        parts = [
            checkpoint(score, hidden_ND[start : start + rows], targets[start : start + rows], use_reentrant=False)
            for start in range(0, len(hidden_ND), rows)
        ]
        return torch.stack(parts).sum()


_LAYERS: weakref.WeakKeyDictionary[nn.Module, OutputLayer | None] = weakref.WeakKeyDictionary()


def output_layer(model: nn.Module) -> OutputLayer | None:
    """Return the output layer of ``model``, perhaps wrapped; None if it has none over a vocabulary."""
    if model not in _LAYERS:
        _LAYERS[model] = _find(model)
    return _LAYERS[model]


def _find(model: nn.Module) -> OutputLayer | None:
    base = unwrap(model)
    base = base.get_base_model() if is_peft_model(base) else base
    layer = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if layer is None:
        return None
    for holder in base.modules():
        for name, child in holder.named_children():
            if child is layer:
                return OutputLayer(base, holder, name, _find_transform(base, holder, name))
    return None


def _plain_weight(layer: nn.Module) -> tuple[torch.Tensor | None, VocabularyPart | None]:
    """Return the weight of this rank, [V, D], and which part of the vocabulary it is, or None for all of it.

    The weight is None where the layer does more than multiply by it.
    """
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        return None, None
    weight = layer.weight
    if not isinstance(weight, DTensor):
        return (None if _has_hooks(layer) else weight), None
    if weight.device_mesh.ndim != 1 or weight.placements != (Shard(0),):
        return None, None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return weight.to_local(), VocabularyPart(weight.shape[0], offset[0], weight.device_mesh.get_group())


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_pre_hooks or layer._forward_hooks)


class _Receiver(nn.Module):
    """A stand-in for an output layer that keeps its input."""

    def __init__(self) -> None:
        super().__init__()
        self.received: list[torch.Tensor] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.received.append(hidden)
        return hidden.new_zeros(1, 1, 1)

    def hidden_of(self, batch: Batch) -> torch.Tensor:
        """Return the hidden states [B, T, D]."""
        if len(self.received) != 1:
            _refuse(f"is called {len(self.received)} times in a forward")
        _require_all_positions(self.received[0], batch)
        return self.received[0]


class _Selector(nn.Module):
    """Applies an output layer to the supervised positions alone: [B, T, D] -> [1, N, V]."""

    def __init__(self, layer: nn.Module, batch: Batch, targets: Targets) -> None:
        super().__init__()
        self._batch, self._targets = batch, targets
        self.__dict__["_layer"] = layer  # not a child: nothing may find its parameters twice

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        _require_all_positions(hidden, self._batch)
        return self._layer(hidden.flatten(0, 1).index_select(0, self._targets.positions_N)[None])


def _require_all_positions(hidden: torch.Tensor, batch: Batch) -> None:
    if hidden.shape[:-1] != batch.labels.shape:
        _refuse(f"gets hidden states of the shape {list(hidden.shape)} for labels {list(batch.labels.shape)}")


def _refuse(why: str) -> None:
    raise UserError(f"loss_fn=linear_cross_entropy: the output layer {why}; use loss_fn=cross_entropy")


class _NoHiddenStates:
    """What the model below the output layer returns while the logits' transform is looked for."""

    def __init__(self) -> None:
        self.last_hidden_state = torch.zeros(1, 1, 1)

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.last_hidden_state


class _Returns(nn.Module):
    """Returns the same value for any input."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self._value = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._value


def _find_transform(base: nn.Module, holder: nn.Module, name: str) -> LogitTransform | None:
    """Return what the forward of ``base`` does to logits, found by giving it some; None if it is of no known form.

    No weight takes part in it.
    """
    config, logits = base.config.get_text_config(), torch.linspace(-90.0, 90.0, 64).reshape(1, 1, 64)
    scales = {1.0, *(_numbers(config, "logit_scale")), *(1 / value for value in _numbers(config, "logits_scaling"))}
    caps = [None, *_numbers(config, "final_logit_softcapping")]
    body = getattr(base, "base_model_prefix", "")
    if body not in base._modules:
        return None
    try:
        with (
            torch.no_grad(),
            _replaced(base, body, _Returns(_NoHiddenStates())),
            _replaced(holder, name, _Returns(logits)),
        ):
            found = base.forward(input_ids=torch.zeros(1, 1, dtype=torch.int64), use_cache=False).logits
    except Exception:  # a forward that needs more than that, of any kind
        return None
    for transform in (LogitTransform(scale, cap) for cap in caps for scale in scales):
        if found.shape == logits.shape and torch.allclose(transform(logits), found, rtol=1e-6, atol=1e-6):
            return transform
    return None


def _numbers(config: Any, key: str) -> list[float]:
    value = getattr(config, key, None)
    return [float(value)] if isinstance(value, int | float) and value else []


@contextmanager
def _replaced(holder: nn.Module, name: str, module: nn.Module) -> Iterator[Any]:
    original = holder._modules[name]
    holder._modules[name] = module
    try:
        yield module
    finally:
        holder._modules[name] = original


@contextmanager
def _with_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
