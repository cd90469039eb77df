"""The handle of a model: everything that depends on how its strategy wrapped it.

Each strategy's file registers the handle of its own wrapper, and ``handle_of`` finds it. No other module asks which
wrapper it holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import nn

_FSDP1 = "FullyShardedDataParallel"


class Handle(Protocol):
    """Everything that training, checkpoints, export and generation need to know about how a model is wrapped.

    A strategy subclasses it and overrides what differs from a model without a wrapper. By default, a wrapper keeps its
    model as ``module``, and gradients count as averaged over the data-parallel ranks.

    Attributes:
        model: what the strategy's ``parallelize`` returned, perhaps compiled.
        wrapper: the outermost module of the registered class: ``model``, or a module in it.
        generates_in_lockstep: a forward on one rank needs the others, so all ranks generate together, round by round.
    """

    model: nn.Module
    wrapper: Any
    generates_in_lockstep: bool = False

    def __init__(self, model: nn.Module, wrapper: Any) -> None:
        self.model = model
        self.wrapper = wrapper

    @property
    def plain_model(self) -> Any:
        """The transformers or PEFT model inside all wrappers, whose parameters have the names of an unwrapped model."""
        model = without_compile(self.model)
        return without_compile(model.module) if model is self.wrapper else model

    @property
    def plain_class(self) -> type:
        """The class of ``plain_model`` before the strategy changed it."""
        return type(self.plain_model)

    def sync_context(self, is_optim_step: bool, *, defer: bool) -> AbstractContextManager[None]:
        """Return the context for the forward and backward of one micro-batch; every rank must enter it.

        Args:
            is_optim_step: this is the last micro-batch before the optimizer's step: on leaving, gradients are reduced.
            defer: gradients may wait for the last micro-batch, at the price of memory.
        """
        return nullcontext()

    def num_ranks_averaged(self, dp_size: int) -> int:
        """Return how many of ``dp_size`` ranks a reduced gradient is the average of; 1 where it is their sum."""
        return dp_size

    def groups(self) -> list[dist.ProcessGroup]:
        """Return the groups over which gradients are reduced, one after another; none: over this rank alone."""
        return []

    def zero_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Free every gradient of the model, which ``optimizer`` trains."""
        optimizer.zero_grad(set_to_none=True)

    def needs_warm_up(self, dp_size: int) -> bool:
        """Return whether only the second backward reduces in the order of all later ones.

        A backward before the first step then makes a resumed run equal to one that was never stopped.
        """
        return False

    def reshard(self) -> None:
        """Free the gathered parameters that a forward without a backward leaves behind.

        An optimizer built while they are gathered would hold and update them, to no effect.
        """

    def whole_weights(self, *, only_trained: bool) -> dict[str, torch.Tensor]:
        """Return the weights by the names of ``plain_model``, whole and on the CPU; every rank must call it.

        At least rank 0 gets them all.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=only_trained)
        return get_model_state_dict(self.plain_model, options=options)

    def describe_shards(self, state: dict[str, Any]) -> None:
        """Note on the tensors of a nested state what torch's distributed checkpoint cannot tell about their shards.

        Every rank must call it.
        """

    def generating(self) -> AbstractContextManager[Any]:
        """Return a context that gives the model whose ``generate`` is to be called; every rank must enter it."""
        return nullcontext(self.plain_model)


class PlainHandle(Handle):
    """The handle of a model that no strategy wrapped."""


Factory = TypeVar("Factory", bound=Callable[[Any, Any], Handle])
_FACTORIES: dict[type | str, Callable[[Any, Any], Handle]] = {}


def register_handle(wrapper_class: type | str) -> Callable[[Factory], Factory]:
    """Return a decorator for the Handle of models wrapped in ``wrapper_class`` or a subclass of it.

    Args:
        wrapper_class: the class, or its full name where importing it here would cost time or needs an optional package.
    """

    def register(factory: Factory) -> Factory:
        _FACTORIES[wrapper_class] = factory
        return factory

    return register


def handle_of(model: nn.Module) -> Handle:
    """Return the handle of ``model``, also where it is inside torch.compile or PEFT, or they are inside its wrapper.

    Raises:
        TypeError: an unknown distributed wrapper, for which any guess could be wrong.
    """
    factories = {_loaded_class(wrapper_class): factory for wrapper_class, factory in _FACTORIES.items()}
    for module in model.modules():  # outermost first
        kinds = type(module).__mro__
        factory = next((factories[kind] for kind in kinds if kind in factories), None)
        if factory is not None:
            return factory(model, module)
        if "FSDP" in kinds[0].__name__ or any(kind.__name__ == _FSDP1 for kind in kinds):
            raise TypeError(f"{type(module).__qualname__} is a distributed wrapper that is not known here")
    return PlainHandle(model, None)


def unwrap(model: nn.Module) -> Any:
    """Return the transformers or PEFT model inside all wrappers of ``model``."""
    return handle_of(model).plain_model


def without_compile(model: nn.Module) -> nn.Module:
    """Return the model inside the wrapper of torch.compile."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod
    return model


def _loaded_class(wrapper_class: type | str) -> type | None:
    """Return the class; None while its package is not imported, so that no model can be wrapped in it."""
    if isinstance(wrapper_class, type):
        return wrapper_class
    package, _, name = wrapper_class.rpartition(".")
    return getattr(sys.modules.get(package), name, None)
