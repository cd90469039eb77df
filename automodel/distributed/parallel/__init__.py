"""Strategies and what hangs on them; importing any module from here registers the handles of the shipped strategies."""

from automodel.distributed.parallel import ddp, fsdp2, megatron_fsdp  # noqa: F401
