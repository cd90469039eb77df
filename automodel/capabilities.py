"""Which strategy takes which option, and what a later version will take; plain data, without torch."""

STRATEGY_OPTIONS: dict[str, dict[str, str]] = {
    "ddp": {
        "defer_grad_sync": "DDP always reduces gradients once a step",
        "mixed_precision": "autocast, with trained weights in float32; pure_bf16: in bf16",
        "activation_checkpointing": "recompute activations in the backward",
    },
    "fsdp2": {
        "defer_grad_sync": "reduce-scatter once a step instead of once a micro-batch",
        "mixed_precision": "weights gathered in bf16, kept and reduced in float32; pure_bf16: kept in bf16",
        "dp_replicate_size": "HSDP: replicas of the sharded model",
        "tp_size": "tensor parallel by the model's own plan, with or without replicas",
        "sequence_parallel": "with tp_size: the sequence is split between the parallel blocks",
        "reshard_after_forward": "free gathered parameters between forward and backward",
        "num_prefetched_layers": "layers gathered ahead while another one computes",
        "cpu_offload": "keep parameters, gradients and optimizer state in host memory",
        "activation_checkpointing": "recompute activations in the backward",
    },
    "megatron_fsdp": {
        "zero_stage": "shards 1: optimizer state, 2: gradients too, 3: parameters too",
        "defer_grad_sync": "stage 1 reduces once a step; 2 and 3 every micro-batch, over replicas once a step",
        "mixed_precision": "weights in bf16, with main weights, gradients and reductions in float32",
        "dp_replicate_size": "replicas of the sharded model",
        "shard_optimizer_over_replicas": "with replicas and stage 3: cut the optimizer state over them as well",
        "activation_checkpointing": "recompute activations in the backward",
    },
}
"""For every strategy its options, each with what it does there."""

LATER_KEYS = ("compile", "profiler")
"""Keys (or sections) that are planned: told as such instead of as a typo."""

LATER_OPTIONS: dict[str, tuple[str, ...]] = {
    "recipe": ("llm_pretrain", "llm_dpo", "llm_kd", "llm_eval"),
    "peft": ("qlora",),
    "loss_fn": ("linear_ce",),
    "logger": ("tensorboard", "mlflow"),
}
"""Options of groups that are planned."""

CHAT_TEMPLATES = ("chatml", "llama3", "gemma", "alpaca")
"""The names that ``dataset.chat_template`` takes besides a file."""

NAMED_BY_USER = (
    "evaluation.scorers",
    "dataset.sources",
    "dataset.chat_template_kwargs",
    "validation_dataset.chat_template_kwargs",
)
"""Tables whose keys the user makes up, so that no plus is needed to add one."""

ROW_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt")
"""The files of a folder that hold rows; each may be gzipped and end in .gz as well."""

ABOUT_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that the library ``datasets`` puts beside rows."""
