"""Start-up, strategies, gradient sync and reductions; the documented public names."""

from importlib import import_module
from typing import Any

_HOME = {
    "DDP": "parallel.ddp",
    "FSDP2": "parallel.fsdp2",
    "MegatronFSDP": "parallel.megatron_fsdp",
    "DistInfo": "runtime.dist_info",
    "initialize_distributed": "runtime.dist_info",
    "destroy_global_state": "runtime.dist_info",
    "get_rank_safe": "runtime.dist_info",
    "get_world_size_safe": "runtime.dist_info",
    "get_local_rank_preinit": "runtime.dist_info",
    "get_local_world_size_preinit": "runtime.dist_info",
    "FirstRankPerNode": "runtime.first_rank",
    "barrier_and_log": "runtime.first_rank",
    "_create_gloo_group": "runtime.side_group",
    "_barrier_with_timeout": "runtime.side_group",
    "dp_eval_sample_shard": "parallel.strategy",
    "get_sync_ctx": "parallel.sync",
    "reduce_loss": "parallel.reduce",
    "rescale_gradients": "parallel.gradients",
    "clip_gradients": "parallel.gradients",
}
__all__ = sorted(name for name in _HOME if not name.startswith("_"))


def __getattr__(name: str) -> Any:
    # Lazily, because the configuration checks the strategies without torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
