"""Tensor parallelism: a transformers model's own plan, carried out by torch's ``parallelize_module``.

With sequence parallel, what lies between the parallel blocks (norms, residuals) holds only this rank's part of
the sequence, and an all-reduce becomes an all-gather before a block and a reduce-scatter after it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from automodel.distributed.parallel.layers import decoder_layers, is_peft_model
from automodel.types import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SEQUENCE_DIM = 1
HEAD_DIM = 2
"""The dim of [batch, sequence, head, features] that a normalisation inside attention finds sharded."""


@dataclass
class _Sequence:
    """Whether the activations between the blocks are split over the ranks in the forward that runs.

    Decided by every forward: a length that the ranks do not divide evenly (a step of generation, say) is
    computed whole on every rank instead.
    """

    is_split: bool = False

    @property
    def placement(self) -> Placement:
        return Shard(SEQUENCE_DIM) if self.is_split else Replicate()


def apply_tensor_parallel(model: nn.Module, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """Shard ``model`` in place over the 1-D ``mesh`` by its own plan; every rank must call it with equal weights.

    Adapters of LoRA on planned modules are sharded with them.

    Raises:
        UserError: the model has no plan, a plan of a kind not known here, or heads that the ranks do not divide.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    plan = _plan_of(base, mesh.size())
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    is_tied = head is not None and head.weight is embeddings.weight
    sequence = _Sequence()
    for name, module in base.named_modules():
        style = _style_of(name, plan)
        if style is not None:
            _parallelize(name, module, style, mesh, sequence)
    if is_tied:
        head.weight = embeddings.weight
    if sequence_parallel:
        _split_sequence(base, plan, mesh, sequence)


def _plan_of(model: nn.Module, tp_size: int) -> dict[str, str]:
    what = f"distributed.tp_size={tp_size}"
    plan = getattr(model, "_tp_plan", None)
    if not plan:
        raise UserError(f"{what}: {type(model).__name__} has no tensor-parallel plan in transformers")
    unknown = sorted(set(plan.values()) - _STYLES)
    if unknown:
        raise UserError(
            f"{what}: the plan of {type(model).__name__} has kinds that are not supported: {', '.join(unknown)}; "
            f"supported are {', '.join(sorted(_STYLES))}"
        )
    config = model.config.get_text_config()
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if heads is not None and heads % tp_size:
            raise UserError(f"{what} does not divide the model's {key}, {heads}")
    return dict(plan)


_STYLES = {
    "colwise", "colwise_gather_output", "rowwise", "rowwise_split_input", "embedding_rowwise",
    "replicated_with_grad_allreduce",
}  # fmt: skip


def _style_of(name: str, plan: dict[str, str]) -> str | None:
    return plan.get(name) or plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))


def _parallelize(name: str, module: nn.Module, style: str, mesh: DeviceMesh, sequence: _Sequence) -> None:
    if hasattr(module, "modules_to_save"):  # PEFT's copy of a module that is trained whole
        for each in (module.original_module, *module.modules_to_save.values()):
            _parallelize(name, each, style, mesh, sequence)
        return
    if style == "replicated_with_grad_allreduce":
        _compute_replicated(module, mesh, lambda: Shard(HEAD_DIM))
        return
    if style == "embedding_rowwise":
        if not isinstance(module, nn.Embedding):
            raise UserError(f"distributed.tp_size: {name} cannot have an adapter of its own under tensor parallel")
        _apply(module, mesh, RowwiseParallel(input_layouts=Replicate()))
        return
    is_adapted = hasattr(module, "base_layer")
    linear = module.base_layer if is_adapted else module
    if style.startswith("colwise"):
        colwise = ColwiseParallel(output_layouts=Replicate() if style.endswith("gather_output") else None)
        _apply(linear, mesh, colwise)
        if is_adapted:
            _require_plain_lora(name, module)
            for adapter in module.lora_B.values():
                _apply(adapter, mesh, colwise)
        return
    rows = Replicate() if style == "rowwise_split_input" else None
    _apply_rowwise(linear, mesh, input_layout=rows, placement=lambda: sequence.placement)
    if is_adapted:
        _require_plain_lora(name, module)
        for down, up in zip(module.lora_A.values(), module.lora_B.values(), strict=True):
            _apply_rowwise(down, mesh, input_layout=rows, placement=Replicate)
            up.register_forward_hook(
                lambda _, __, out: _redistribute(out, mesh, Replicate(), sequence.placement)  # the part of this rank
            )


def _require_plain_lora(name: str, module: nn.Module) -> None:
    if getattr(module, "use_dora", None) and any(module.use_dora.values()):
        raise UserError(
            "distributed.tp_size: DoRA needs the norms of whole weights, which tensor parallel splits; use peft=lora"
        )
    if not isinstance(module.base_layer, nn.Linear):
        raise UserError(f"distributed.tp_size: the adapted {name} is no linear layer")


def _apply(module: nn.Module, mesh: DeviceMesh, style: Any) -> None:
    parallelize_module(module, mesh, style, src_data_rank=None)  # every rank has loaded the same weights


def _apply_rowwise(module: nn.Module, mesh: DeviceMesh, *, input_layout: Placement | None, placement: Any) -> None:
    """Split ``module`` by rows; its partial sums go to what ``placement`` says when it runs."""
    style = RowwiseParallel(input_layouts=input_layout, output_layouts=Partial(), use_local_output=False)
    _apply(module, mesh, style)
    module.register_forward_hook(lambda _, __, out: out.redistribute(placements=[placement()]).to_local())


def _redistribute(tensor: torch.Tensor, mesh: DeviceMesh, now: Placement, then: Placement) -> torch.Tensor:
    if now == then:
        return tensor
    return DTensor.from_local(tensor, mesh, [now], run_check=False).redistribute(placements=[then]).to_local()


def _compute_replicated(module: nn.Module, mesh: DeviceMesh, placement: Any) -> None:
    """Keep whole weights in ``module``, whose input is a part: the parts' gradients of the weights are summed."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        whole = distribute_tensor(parameter.detach(), mesh, [Replicate()], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))
    module.register_forward_pre_hook(
        lambda _, args: (DTensor.from_local(args[0], mesh, [placement()], run_check=False), *args[1:])
    )
    module.register_forward_hook(lambda _, __, out: out.to_local())


def _split_sequence(base: nn.Module, plan: dict[str, str], mesh: DeviceMesh, sequence: _Sequence) -> None:
    layers = decoder_layers(base)
    names = {id(module): name for name, module in base.named_modules()}

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        sequence.is_split = args[0].shape[SEQUENCE_DIM] % mesh.size() == 0
        return (_redistribute(args[0], mesh, Replicate(), sequence.placement), *args[1:])

    def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (_redistribute(args[0], mesh, sequence.placement, Replicate()), *args[1:]), kwargs
        whole = _redistribute(kwargs["hidden_states"], mesh, sequence.placement, Replicate())
        return args, kwargs | {"hidden_states": whole}

    layers[0].register_forward_pre_hook(enter)
    for layer in layers:
        for child in layer.children():
            inner = [f"{names[id(child)]}.{name}" for name, _ in child.named_modules() if name]
            if any(_style_of(name, plan) for name in inner):
                child.register_forward_pre_hook(gather, with_kwargs=True)
            elif any(True for _ in child.parameters()):
                _compute_replicated(child, mesh, lambda: sequence.placement)
    layers[-1].register_forward_hook(lambda _, __, out: _redistribute(out, mesh, sequence.placement, Replicate()))
