"""Start-up, strategies, gradient sync and reductions; the documented public names."""

from importlib import import_module
from typing import Any

_HOME = {
    "DistInfo": "dist_info",
    "initialize_distributed": "dist_info",
    "destroy_global_state": "dist_info",
    "get_rank_safe": "dist_info",
    "get_world_size_safe": "dist_info",
    "get_local_rank_preinit": "dist_info",
    "get_local_world_size_preinit": "dist_info",
    "FirstRankPerNode": "first_rank",
    "barrier_and_log": "first_rank",
    "_create_gloo_group": "side_group",
    "_barrier_with_timeout": "side_group",
    "dp_eval_sample_shard": "mesh",
    "get_sync_ctx": "sync",
    "reduce_loss": "reduce",
    "rescale_gradients": "gradients",
    "clip_gradients": "gradients",
}
__all__ = sorted(name for name in _HOME if not name.startswith("_"))


def __getattr__(name: str) -> Any:
    # Lazily, because the configuration looks at the strategies in here without torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
