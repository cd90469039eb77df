"""Which strategy takes which option, and what a later version will take; plain data, without torch."""

STRATEGY_OPTIONS: dict[str, dict[str, str]] = {
    "ddp": {
        "defer_grad_sync": "DDP always reduces gradients once a step",
        "mixed_precision": "autocast; the weights keep model.dtype",
        "activation_checkpointing": "recompute activations in the backward",
    },
    "fsdp2": {
        "defer_grad_sync": "reduce-scatter once a step instead of once a micro-batch",
        "mixed_precision": "parameters gathered in bf16, gradients reduced in float32",
        "dp_replicate_size": "HSDP: replicas of the sharded model",
        "reshard_after_forward": "free gathered parameters between forward and backward",
        "cpu_offload": "keep parameters, gradients and optimizer state in host memory",
        "activation_checkpointing": "recompute activations in the backward",
    },
}
"""For every strategy its options, each with what it does there."""

LATER_KEYS = (
    "packing",
    "compile",
    "profiler",
    "checkpoint.async_save",
    "checkpoint.keep_every",
    "dataloader.length_grouped",
    "dataloader.max_tokens_per_batch",
    "distributed.tp_size",
    "distributed.zero_stage",
    "dataset.on_bad_row",
    "dataset.streaming",
)
"""Keys (or sections) that are planned: told as such instead of as a typo."""

LATER_OPTIONS: dict[str, tuple[str, ...]] = {
    "recipe": ("llm_pretrain", "llm_dpo", "llm_kd", "llm_eval"),
    "distributed": ("megatron_fsdp",),
    "peft": ("lora", "dora", "qlora"),
    "dataset": ("mixture",),
    "validation_dataset": ("mixture",),
    "loss_fn": ("linear_ce",),
    "logger": ("tensorboard", "mlflow"),
    "launch": ("slurm",),
}
"""Options of groups that are planned."""

CHAT_TEMPLATES = ("chatml",)
"""The names that ``dataset.chat_template`` takes besides a file."""
