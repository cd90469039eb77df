"""What a strategy is, the device mesh of a run, and its data-parallel ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from automodel.types import UserError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.optim import Optimizer

    from automodel.distributed.runtime.dist_info import DistInfo

_NAMING_KEYS = ("_target_", "strategy", "name")
_SHARDED_NAMES = ("fsdp", "hsdp", "fullyshard", "zero", "tensorparallel")
_WHOLE_NAMES = ("ddp", "dataparallel")

REPLICATE_AXIS = "dp_replicate"
SHARD_AXIS = "dp_shard"
TP_AXIS = "tp"


class Strategy(Protocol):
    """What every option of ``distributed`` offers; each subclass has a file of its own and overrides what differs.

    Attributes:
        is_sharded: a forward on one rank needs the others.
        length_multiple: what the length of a batch should be a multiple of.
    """

    name: str
    is_sharded: bool = False
    length_multiple: int = 1
    defer_grad_sync: bool = True

    def build_mesh(self, dist_info: DistInfo) -> DeviceMesh:
        """Return the mesh of all ranks; every rank must call it."""

    def parallelize(self, model: nn.Module, *, dist_info: DistInfo, mesh: DeviceMesh) -> nn.Module:
        """Move ``model`` to the device and wrap or shard it; every rank must call it.

        The file that holds the strategy registers the Handle of its wrapper (``parallel/handle.py``).
        """

    def device_of_shards(self, dist_info: DistInfo) -> torch.device | None:
        """Return where to put the shards of a model that came to ``parallelize`` on the meta device.

        None: ``parallelize`` takes a model only with its weights.
        """
        return None

    def prepare_optimizer(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Tie ``optimizer`` to what ``parallelize`` returned."""

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Return the context of a forward: none, where the weights or the wrapper decide the computing precision."""
        return nullcontext()


@dataclass(frozen=True)
class DataParallel:
    """This rank's place among those that share the rows of a step.

    Attributes:
        rank: which share of the rows is this rank's; the ranks of a tensor-parallel group have the same one.
        size: number of shares.
        group: one rank of every share, this one among them; gradients are averaged and counts summed over it.
    """

    rank: int
    size: int
    group: dist.ProcessGroup


def mesh_problems(section: dict[str, Any], *, world_size: int) -> Iterator[str]:
    """Yield a line where the sizes of the section ``distributed`` do not divide the ranks."""
    tp_size, replicas = section.get("tp_size", 1), section.get("dp_replicate_size", 1)
    if world_size % tp_size:
        yield f"distributed.tp_size={tp_size} must divide the number of ranks, {world_size}"
        return
    dp_size = world_size // tp_size
    if dp_size % replicas:
        ranks = "ranks" if tp_size == 1 else f"data-parallel ranks ({world_size} / tp_size {tp_size})"
        yield f"distributed.dp_replicate_size={replicas} must divide the number of {ranks}, {dp_size}"


def build_mesh(dist_info: DistInfo, *, dp_replicate_size: int = 1, tp_size: int = 1) -> DeviceMesh:
    """Return a mesh of axes (dp_replicate, dp_shard, tp) over all ranks; every rank must call it.

    Neighbouring ranks, which share a node, form a tensor-parallel group.

    Raises:
        ValueError: ``dp_replicate_size`` x ``tp_size`` does not divide the number of ranks.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    num_shards, rest = divmod(dist_info.world_size, dp_replicate_size * tp_size)
    if rest:
        raise ValueError(
            f"dp_replicate_size {dp_replicate_size} x tp_size {tp_size} does not divide {dist_info.world_size} ranks"
        )
    sizes = {REPLICATE_AXIS: dp_replicate_size, SHARD_AXIS: num_shards, TP_AXIS: tp_size}
    kind = "cpu" if dist_info.device.type == "mps" else dist_info.device.type  # mps has no collectives of its own
    shape, axes = tuple(sizes.values()), tuple(sizes)
    if dist_info.world_size == 1 or dist.group.WORLD.bound_device_id is not None:  # the latter: one split for an axis
        return init_device_mesh(kind, shape, mesh_dim_names=axes)
    # For an axis of size 1, torch would have every rank take part in making the groups of all ranks, one by one.
    groups = dict.fromkeys(axes, dist.new_group([dist.get_rank()], use_local_synchronization=True))
    split = {axis: size for axis, size in sizes.items() if size > 1}
    inner = init_device_mesh(kind, tuple(split.values()), mesh_dim_names=tuple(split))
    groups |= {axis: inner.get_group(axis) for axis in split}
    ranks = torch.arange(dist_info.world_size).reshape(shape)
    return DeviceMesh.from_group(list(groups.values()), kind, mesh=ranks, mesh_dim_names=axes)


def dp_eval_sample_shard(distributed_config: Any, dp_rank: int, dp_size: int) -> tuple[int, int] | None:
    """Return the (index, number) of this rank's own share of the rows of a generated-answer evaluation.

    None where the ranks must not generate on their own: a strategy that shards the model has every rank take
    part in every forward, so that they take the rows in rounds, together; and a single rank has nothing to share.

    Args:
        distributed_config: a Strategy, or what names one: its name (``ddp``, ``fsdp2``, ...) or class path; a mapping,
            dataclass or namespace with ``_target_``, ``strategy`` or ``name``; an object whose class is named so.

    Raises:
        UserError: it names no strategy that is known.
    """
    return None if dp_size == 1 or _is_sharded(distributed_config) else (dp_rank, dp_size)


def _is_sharded(config: Any) -> bool:
    if hasattr(config, "is_sharded"):
        return config.is_sharded
    if isinstance(config, Enum):
        return _is_sharded(config.value if isinstance(config.value, str) else config.name)
    if not isinstance(config, str):
        entries = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
        named = [entries[key] for key in _NAMING_KEYS if entries.get(key) is not None]
        kind = config if isinstance(config, type) else type(config)
        return _is_sharded(named[0] if named else kind.__name__)
    name = re.sub(r"[^a-z0-9]", "", config.rpartition(".")[2].lower())
    if any(word in name for word in _SHARDED_NAMES):
        return True
    if any(word in name for word in _WHOLE_NAMES):
        return False
    raise UserError(f"distributed={config!r} names no strategy that is known: ddp, fsdp2 or megatron_fsdp")


def data_parallel(mesh: DeviceMesh) -> DataParallel:
    """Return this rank's place among the data-parallel ranks of ``mesh``; every rank must call it, once a run."""
    import torch
    import torch.distributed as dist

    shares = mesh.mesh.reshape(-1, mesh[TP_AXIS].size())
    rank, tp_rank = (shares == dist.get_rank()).nonzero()[0].tolist()
    if shares.shape[1] == 1:
        return DataParallel(rank, shares.shape[0], dist.group.WORLD)
    own = mesh[SHARD_AXIS].get_group()
    if mesh[REPLICATE_AXIS].size() == 1 and torch.device("cpu") in own._device_types:
        return DataParallel(rank, shares.shape[0], own)
    # Made by ourselves, so that it takes tensors of the host too, as the main group does.
    groups = [dist.new_group(shares[:, column].tolist()) for column in range(shares.shape[1])]
    return DataParallel(rank, shares.shape[0], groups[tp_rank])
