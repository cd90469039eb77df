"""Parameter groups and the optimizers that take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, NonNegativeFloat, NonPositiveFloat, PositiveFloat

from automodel.config.targets import resolve
from automodel.distributed.parallel.handle import unwrap
from automodel.distributed.parallel.layers import decoder_layers
from automodel.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from automodel.config import Config

Beta = Annotated[float, Field(ge=0, lt=1)]


def parameter_groups(model: nn.Module, *, splits_b: bool = False) -> list[dict[str, Any]]:
    """Split the trained parameters: matrices decay as configured; norms, biases and other vectors never do.

    Parameters on different meshes (some tensor parallel, some not) get separate groups: fused kernels take parameters
    of one mesh at a time. Groups of the matrices of decoder layers, which are neither embeddings nor heads, have
    ``is_hidden``.

    Args:
        splits_b: the matrices B of adapters are in separate groups, after all others.
    """
    hidden = _hidden_matrices(unwrap(model))
    groups: dict[Any, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_b, is_vector = splits_b and _is_b(name), parameter.ndim < 2
            key = (is_b, is_vector, getattr(parameter, "device_mesh", None), id(parameter) in hidden)
            groups.setdefault(key, []).append(parameter)
    options = {True: {"weight_decay": 0.0}, False: {}}
    marks = {True: {"is_hidden": True}, False: {}}
    return [
        {"params": group} | options[is_vector] | marks[is_hidden]
        for (_, is_vector, _, is_hidden), group in sorted(groups.items(), key=lambda item: item[0][:2])
    ]


def build_optimizer(
    make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer], model: nn.Module, *, lr_ratio: float | None = None
) -> torch.optim.Optimizer:
    """Build an optimizer of the trained parameters, whose first group has the learning rate that ``make`` gives.

    Args:
        make: what the ``optimizer`` section builds.
        lr_ratio: the matrices B of adapters learn at so many times that rate: LoRA+ (Hayou et al. 2024,
            arXiv 2402.12354); None: at the same rate. A schedule scales both.
    """
    if lr_ratio is None:
        return make(parameter_groups(model))
    optimizer = make(parameter_groups(model, splits_b=True))
    of_b = {id(parameter) for name, parameter in model.named_parameters() if _is_b(name)}
    for group in optimizer.param_groups:
        if id(group["params"][0]) in of_b:
            group["lr"] *= lr_ratio
    return optimizer


def _is_b(name: str) -> bool:
    """Return whether a parameter is the matrix of an adapter that begins at 0."""
    return ".lora_B." in name


def _hidden_matrices(model: nn.Module) -> set[int]:
    from torch import nn

    modules = [module for layer in decoder_layers(model) for module in layer.modules()]
    own = [module.parameters(recurse=False) for module in modules if not isinstance(module, nn.Embedding)]
    return {id(parameter) for parameters in own for parameter in parameters if parameter.ndim == 2}


def adamw(
    params: Sequence[dict[str, Any]],
    *,
    lr: PositiveFloat = 1e-5,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: NonNegativeFloat = 1e-8,
    weight_decay: NonNegativeFloat = 0.01,
) -> torch.optim.Optimizer:
    """Build AdamW (Loshchilov and Hutter 2019), fused where torch has a fused kernel for the device."""
    import torch

    return torch.optim.AdamW(
        params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, fused=_has_fused_kernel(params)
    )


def sgd(
    params: Sequence[dict[str, Any]],
    *,
    lr: PositiveFloat = 1e-3,
    momentum: NonNegativeFloat = 0.0,
    weight_decay: NonNegativeFloat = 0.0,
) -> torch.optim.Optimizer:
    """Build stochastic gradient descent, fused where torch has a fused kernel for the device and the sharding."""
    import torch
    from torch.distributed.tensor import DTensor

    is_sharded = any(isinstance(parameter, DTensor) for group in params for parameter in group["params"])
    is_fused = _has_fused_kernel(params) and not is_sharded  # unlike AdamW's, SGD's fused kernel takes no DTensor
    return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=is_fused)


def adafactor(
    params: Sequence[dict[str, Any]],
    *,
    lr: PositiveFloat = 1e-3,
    beta2_decay: NonPositiveFloat = -0.8,
    weight_decay: NonNegativeFloat = 0.0,
) -> torch.optim.Optimizer:
    """Build torch's Adafactor (Shazeer and Stern 2018): a row and a column of state for a matrix.

    The rate is relative to the size of a weight (its root mean square, at least 1e-3). On an accelerator the host waits
    for the device at every weight.
    """
    import torch

    return torch.optim.Adafactor(params, lr=lr, beta2_decay=beta2_decay, weight_decay=weight_decay)


def muon(
    params: Sequence[dict[str, Any]],
    *,
    lr: PositiveFloat = 1e-5,
    momentum: Beta = 0.95,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: NonNegativeFloat = 1e-8,
    weight_decay: NonNegativeFloat = 0.01,
) -> torch.optim.Optimizer:
    """Build Muon for the matrices of the decoder layers and AdamW for all else; see ``automodel/optim/muon.py``."""
    from automodel.optim.muon import MuonAndAdamW

    return MuonAndAdamW(
        params, lr=lr, momentum=momentum, betas=tuple(betas), eps=eps, weight_decay=weight_decay,
        fused=_has_fused_kernel(params),
    )  # fmt: skip


def adamw_8bit(
    params: Sequence[dict[str, Any]],
    *,
    lr: PositiveFloat = 1e-5,
    betas: tuple[Beta, Beta] = (0.9, 0.999),
    eps: NonNegativeFloat = 1e-8,
    weight_decay: NonNegativeFloat = 0.01,
) -> torch.optim.Optimizer:
    """Build the AdamW of bitsandbytes, whose state has 8 bits a number (Dettmers et al. 2022).

    Raises:
        UserError: bitsandbytes has no kernel for the device.
    """
    kinds = {parameter.device.type for group in params for parameter in group["params"]} - {"cuda", "cpu", "xpu"}
    if kinds:
        raise UserError(f"optimizer=adamw_8bit has no kernel for {', '.join(sorted(kinds))}; choose optimizer=adamw")
    from automodel.optim.eight_bit import AdamW8bit

    return AdamW8bit(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)


def _sharded_problems(
    section: dict[str, Any], cfg: Config, *, key: str, world_size: int, but: Sequence[str] = ()
) -> Iterator[str]:
    """Yield a line where the strategy shards the weights and the optimizer takes them whole."""
    strategy = resolve(cfg.distributed["_target_"])
    if getattr(strategy, "is_sharded", False) and strategy.name not in but:
        others = " or ".join(["ddp", *but])
        yield (
            f"optimizer={cfg.optimizer['_target_'].rpartition('.')[2]} does not take the sharded weights of "
            f"distributed={strategy.name}: choose distributed={others}, or optimizer=adamw"
        )


def _problems_of_8bit(section: dict[str, Any], cfg: Config, *, key: str, world_size: int) -> Iterator[str]:
    yield from _sharded_problems(section, cfg, key=key, world_size=world_size)
    if find_spec("bitsandbytes") is None:
        yield "optimizer=adamw_8bit needs the package bitsandbytes: pip install 'automodel[8bit]'"


adafactor.problems = _sharded_problems  # see config/targets.py
adamw_8bit.problems = _problems_of_8bit
muon.problems = partial(_sharded_problems, but=("fsdp2",))


def _has_fused_kernel(params: Sequence[dict[str, Any]]) -> bool:
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    supported = _get_fused_kernels_supported_devices()
    return all(p.device.type in supported for group in params for p in group["params"])
