"""Which device a rank computes on, and which backend connects it with the others."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

from automodel.distributed.runtime.dist_info import get_local_rank_preinit, get_world_size_safe
from automodel.types import UserError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

DEFAULTS = {
    "cuda": ("nccl",),
    "cpu": ("gloo",),
    "mps": ("gloo",),
    "xpu": ("xccl", "ccl"),
    "hpu": ("hccl",),
    "npu": ("hccl",),
    "mlu": ("cncl",),
}
"""By device, the backend that ``auto`` means: the first one that this torch has, or that a package brings."""
PACKAGES = {
    ("ccl", "xpu"): "oneccl_bindings_for_pytorch",
    ("ccl", "cpu"): "oneccl_bindings_for_pytorch",
    ("hccl", "hpu"): "habana_frameworks.torch.distributed.hccl",
    ("hccl", "npu"): "torch_npu",
    ("cncl", "mlu"): "torch_mlu",
}
"""What registers a backend that torch does not have itself, by backend and device; imported when it is needed."""
_NEEDS = {"nccl": ("cuda",), "xccl": ("xpu",), "ccl": ("xpu", "cpu"), "hccl": ("hpu", "npu"), "cncl": ("mlu",)}


def choose_device(backend: str) -> torch.device:
    """Return the device of this rank for ``backend``, as ``initialize_distributed`` takes it.

    Raises:
        UserError: there is none left for it.
    """
    import torch

    kind = _accelerator()
    named = [part.partition(":")[0].strip() for part in backend.split(",")] if ":" in backend else []
    if backend == "gloo" or kind is None or (named and kind not in named):
        return torch.device("cpu")
    if kind == "mps":
        return torch.device("mps") if get_world_size_safe() == 1 else torch.device("cpu")
    local_rank, num_devices = get_local_rank_preinit(), _num_devices()
    if local_rank >= num_devices and num_devices > 1 and not _has_devices_of_its_own():
        raise UserError(_too_few(local_rank, kind, num_devices))
    # A rank that sees one device alone counts it as 0, whichever of the node's it is; or all see the same one, which
    # refuse_shared_devices tells.
    return torch.device(kind, local_rank % max(1, num_devices))


def backend_spec(backend: str, device: torch.device) -> str:
    """Return the backend for init_process_group; refuses one that is unknown, absent or made for another device."""
    if ":" in backend:
        pairs = dict(tuple(word.strip() for word in part.split(":", 1)) for part in backend.split(",") if ":" in part)
        kind = "cpu" if device.type == "mps" else device.type
        if kind not in pairs:
            raise UserError(f"dist_env.backend={backend} names no backend for the {kind}, on which this rank computes")
        # What is for a device that is not here is left out.
        chosen = {"cpu": pairs.get("cpu", "gloo"), kind: pairs[kind]}
        for for_kind, name in chosen.items():
            _require(name, for_kind)
        return ",".join(f"{for_kind}:{name}" for for_kind, name in chosen.items())
    name = _default(device.type) if backend == "auto" else backend
    _require(name, device.type)
    return name if device.type in ("cpu", "mps") else f"cpu:gloo,{device.type}:{name}"


def refuse_shared_devices(store: dist.Store, device: torch.device, *, rank: int, world_size: int) -> None:
    """Raise the same UserError on every rank where two of them would compute on one device; all must call it."""
    import torch.distributed as dist

    places = dist.PrefixStore("device", store)
    places.set(str(rank), f"{get_local_rank_preinit()} {_num_devices()} {_identity(device)}")
    keys = [str(other) for other in range(world_size)]
    places.wait(keys)
    first: dict[str, int] = {}
    for other, place in enumerate(places.multi_get(keys)):
        local_rank, num_devices, identity = place.decode().split(" ", 2)
        if identity and first.setdefault(identity, other) != other:
            told = _too_few(int(local_rank), device.type, int(num_devices))
            raise UserError(f"{told}. Ranks {first[identity]} and {other} on {identity.split()[0]} would share one")


def _accelerator() -> str | None:
    """Return the kind of accelerator that is usable here; Habana's is no accelerator in torch's own sense."""
    import torch

    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator().type
    with suppress(ImportError):
        import_module("habana_frameworks.torch")
    hpu = getattr(torch, "hpu", None)
    return "hpu" if hpu is not None and hpu.is_available() else None


def _num_devices() -> int:
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else torch.hpu.device_count()


def _has_devices_of_its_own() -> bool:
    """Return whether SLURM gave each task devices of its own (--gpus-per-task), which all count from 0."""
    is_said = "SLURM_GPUS_PER_TASK" in os.environ or "gpu" in os.environ.get("SLURM_TRES_PER_TASK", "")
    return is_said and "SLURM_STEP_ID" in os.environ


def _identity(device: torch.device) -> str:
    """Return what tells ``device`` from all others of the job, the host first; empty where that cannot be known."""
    import torch

    uuid = None
    with suppress(Exception):
        uuid = torch.get_device_module(device.type).get_device_properties(device.index).uuid
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if uuid is None and _has_devices_of_its_own():
        return ""
    if uuid is None or "MIG" in visible:  # the parts of one device may share its number
        uuid = f"{visible}/{device.index}"
    return f"{socket.gethostname()} {uuid}"


def _too_few(local_rank: int, kind: str, num_devices: int) -> str:
    return (
        f"local rank {local_rank} has no {kind} device: this node shows {num_devices}; "
        f"start at most {num_devices} processes a node, or choose dist_env.backend=gloo to run on the CPU"
    )


def _default(kind: str) -> str:
    import torch.distributed as dist

    for name in DEFAULTS.get(kind, ()):
        if name in _usable(name, kind):
            return name
    try:
        return dist.get_default_backend_for_device(kind)
    except ValueError:
        raise UserError(f"torch has no default backend for {kind}: name one with dist_env.backend") from None


def _require(name: str, kind: str) -> None:
    needs = _NEEDS.get(name)
    if needs and kind not in needs:
        kinds = " or ".join("CUDA" if each == "cuda" else each for each in needs)
        told = f"dist_env.backend={name} needs a {kinds} device and none is visible"
        raise UserError(f"{told}; use dist_env.backend=auto")
    usable = _usable(name, kind)
    if name in usable:
        return
    package = PACKAGES.get((name, kind))
    if package is not None:
        raise UserError(f"dist_env.backend={name} comes with {package}, which cannot be imported here")
    has = f"it has: {', '.join(sorted(usable))}"
    if name in _checks():
        raise UserError(f"dist_env.backend={name}: this torch was built without it; {has}")
    raise UserError(
        f"dist_env.backend={name}: this torch knows no such backend; {has} "
        "(one from another package is there once that package is imported)"
    )


def _checks() -> dict[str, Callable[[], bool]]:
    import torch.distributed as dist

    return {
        "gloo": dist.is_gloo_available,
        "nccl": dist.is_nccl_available,
        "xccl": dist.is_xccl_available,
        "ucc": dist.is_ucc_available,
        "mpi": dist.is_mpi_available,
    }


def _usable(name: str, kind: str) -> set[str]:
    """Return the backends that torch has now, after the package that brings ``name`` was imported, if it is there."""
    import torch.distributed as dist

    if (name, kind) in PACKAGES:
        with suppress(ImportError):
            import_module(PACKAGES[name, kind])
    checks = _checks()
    registered = set(dist.Backend.backend_list) - {*checks, "undefined", "fake"}
    return {check for check in checks if checks[check]()} | registered
