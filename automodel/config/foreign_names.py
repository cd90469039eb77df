"""The names that other tools give to what a configuration says here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Foreign:
    """One thing, by its names elsewhere and here.

    Attributes:
        names: the keys elsewhere, without the sections that only wrap everything.
        tools: letters of the tools that have one of them: TRL and transformers, axolotl, LLaMA-Factory, (U) torchtune,
            NeMo Automodel.
        ours: what to write instead, ``{}`` standing for the value; empty: there is no such thing here.
        remark: what differs, or what to do instead.
    """

    names: str
    tools: str
    ours: str = ""
    remark: str = ""

    def hint(self, value: str | None) -> str:
        """Return what to do about one of the names, given with ``value``."""
        if not self.ours:
            return f"there is no such thing here: {self.remark}"
        written = self.ours.replace("{}", "..." if value is None else value)
        return f"write {written}" + (f" ({self.remark})" if self.remark else "")


_LORA = "peft=lora peft."
_MODEL = "model=hf model.pretrained_model_name_or_path={}"
_ROWS = "dataset=hf dataset.path={}"
_GLOBAL = "step_scheduler.global_batch_size=..."
_ACCUMULATION = "rows per optimizer step: local_batch_size x ranks x accumulation steps"
_QUANTIZED = "4-bit frozen weights under adapters, on CUDA; peft=lora model.dtype=bfloat16 holds them in 2 bytes each"
_OWN_CODE = "any class or function of yours can be named as _target_"

SECTIONS: dict[str, tuple[Foreign, ...]] = {
    "Model": (
        Foreign("model_name_or_path base_model", "TAL", _MODEL, "a folder or a hub id"),
        Foreign("checkpointer.checkpoint_dir", "U", _MODEL,
                "a Hugging Face folder; what is trained goes to output_dir"),
        Foreign("model_revision revision_of_model", "TA", "model.revision={}"),
        Foreign("tokenizer_name tokenizer_name_or_path tokenizer_config tokenizer.path", "TAU",
                remark="the tokenizer is that of model.pretrained_model_name_or_path"),
        Foreign("torch_dtype model_init_kwargs", "TN", "model.dtype={}", "float32 or bfloat16"),
        Foreign("bf16 bfloat16", "TAL", "distributed.mixed_precision=bf16",
                "the default on CUDA; trained weights stay float32, and model/ is written in model.dtype"),
        Foreign("pure_bf16", "L", "distributed.mixed_precision=pure_bf16",
                "trains bf16 weights: small updates are lost; bf16 keeps float32 ones"),
        Foreign("fp16 float16", "TAL",
                remark="float16 overflows without loss scaling; distributed.mixed_precision=bf16"),
        Foreign("attn_implementation flash_attention flash_attn use_flash_attention_2 sdpa_method", "TALN",
                "model.attn_implementation=flash_attention_2", "or sdpa, eager"),
        Foreign("trust_remote_code", "TAL", "model.trust_remote_code={}"),
        Foreign("load_in_4bit quantization_bit quantization qlora", "TALN", "peft=qlora", _QUANTIZED),
        Foreign("bnb_4bit_quant_type", "TN", "peft=qlora peft.quantization={}", "nf4 or fp4"),
        Foreign("bnb_4bit_use_double_quant use_bnb_nested_quant double_quantization", "TLN",
                "peft=qlora peft.double_quantization={}"),
        Foreign("bnb_4bit_compute_dtype", "TN", "peft=qlora peft.compute_dtype={}"),
        Foreign("load_in_8bit", "TA", remark="frozen weights are quantized to 4 bit alone: peft=qlora"),
        Foreign("rope_scaling rope_theta", "TAL", remark="change the model's own config.json"),
        Foreign("remove_unused_columns auto_find_batch_size", "TA", remark="nothing of the kind is needed"),
        Foreign("use_liger_kernel liger_kernel enable_liger_kernel cut_cross_entropy", "TAL",
                remark="loss_fn=linear_cross_entropy, the default, computes no logits where nothing is supervised"),
        Foreign("fp8 qat", "AUN", remark="neither float8 nor quantization-aware training"),
    ),
    "Adapters": (
        Foreign("finetuning_type adapter use_peft", "TAL", "peft=lora", "peft=none trains every weight"),
        Foreign("lora_r lora_rank r dim", "TALUN", f"{_LORA}rank={{}}"),
        Foreign("lora_alpha", "TALU", f"{_LORA}alpha={{}}"),
        Foreign("lora_dropout", "TALU", f"{_LORA}dropout={{}}"),
        Foreign("lora_target_modules lora_target lora_attn_modules", "TALU", f"{_LORA}target_modules={{}}",
                "a list of names, one regular expression, or all-linear"),
        Foreign("lora_target_linear match_all_linear apply_lora_to_mlp", "AUN", f"{_LORA}target_modules=all-linear"),
        Foreign("lora_modules_to_save additional_target", "TAL", f"{_LORA}modules_to_save={{}}"),
        Foreign("use_dora peft_use_dora", "TALUN", "peft=dora"),
        Foreign("use_rslora peft_use_rslora", "TAL", f"{_LORA}use_rslora={{}}"),
        Foreign("loraplus_lr_ratio", "AL", f"{_LORA}lr_ratio={{}}", "of the matrices B"),
        Foreign("loraplus_lr_embedding", "AL", remark="adapters of embeddings learn at optimizer.lr"),
        Foreign("pissa_init", "L", f"{_LORA}init_lora_weights=pissa"),
        Foreign("init_lora_weights peft_init_lora_weights", "TA", f"{_LORA}init_lora_weights={{}}"),
        Foreign("lora_target_parameters", "TA", f"{_LORA}target_parameters={{}}"),
        Foreign("adapter_name_or_path lora_model_dir", "AL", f"{_LORA}init_from={{}}"),
        Foreign("exclude_modules", "N", remark="peft.target_modules takes a regular expression that leaves them out"),
        Foreign("freeze_trainable_layers unfrozen_parameters", "AL",
                remark="every weight is trained (peft=none), or adapters alone (peft=lora)"),
    ),
    "Rows": (
        Foreign("dataset_name datasets path_or_dataset_id", "TALN", _ROWS,
                "local files: dataset=jsonl dataset.path=..."),
        Foreign("dataset.source", "U", _ROWS, "local files: dataset=jsonl dataset.path=..."),
        Foreign("data_files dataset_path train_file dataset_dir", "TLU", "dataset=jsonl dataset.path={}"),
        Foreign("dataset_config dataset_config_name", "T", "dataset.name={}"),
        Foreign("dataset_train_split dataset_split", "T", "dataset.split={}"),
        Foreign("dataset_test_split eval_split", "T", "validation_dataset.split={}"),
        Foreign("eval_dataset test_datasets validation_file", "TAL",
                "validation_dataset=jsonl validation_dataset.path={}"),
        Foreign("val_set_size val_size", "AL", "dataset.validation_share={}", "a share of the rows, not a number"),
        Foreign("dataset_text_field text_column", "T", "dataset.columns.text={}"),
        Foreign("dataset_format column_map", "U", "dataset.format={}", "auto finds it from the first row's fields"),
        Foreign("max_samples limit_dataset_samples", "LN", "dataset.limit={}"),
        Foreign("max_seq_length max_length sequence_len cutoff_len max_seq_len model_max_length seq_length seq_len",
                "TALUN", "dataset.max_length={}"),
        Foreign("truncation_side", "T", "dataset.truncation={}", "right, left, drop or error"),
        Foreign("chat_template template chat_template_path prompt_template", "TALU", "dataset.chat_template={}",
                "null: the tokenizer's own; chatml, llama3, gemma, alpaca, or a jinja file"),
        Foreign("train_on_inputs train_on_input train_on_prompt", "ALU",
                remark="answers alone are trained; rows of a field text are trained on whole"),
        Foreign("completion_only_loss assistant_only_loss train_on_responses_only answer_only_loss_mask "
                "roles_to_train", "TAN", remark="always so: answers alone are trained (dataset.supervise)"),
        Foreign("mask_history", "L", "dataset.supervise=last", "all: every turn of the assistant"),
        Foreign("packing sample_packing neat_packing packed", "TALU", "packing.enabled={}",
                "the length of a pack: packing.max_length"),
        Foreign("packed_sequence.packed_sequence_size packed_sequence_size", "N",
                "packing.enabled=true packing.max_length={}"),
        Foreign("pad_to_sequence_len pad_to_multiple_of", "TA", remark="a batch is padded to its longest row"),
        Foreign("group_by_length", "TAN", "dataloader.length_grouped={}"),
        Foreign("dataset_num_proc preprocessing_num_workers dataset_processes", "TAL", "dataset.num_proc={}"),
        Foreign("dataloader_num_workers", "TAL", "dataloader.num_workers={}"),
        Foreign("dataloader_drop_last", "TA", "dataloader.drop_last={}"),
        Foreign("streaming", "TAL", "dataset.streaming={}", "needs step_scheduler.max_steps"),
        Foreign("buffer_size shuffle_buffer_size", "LN", "dataset.buffer_rows={}"),
        Foreign("shuffle", "UN", remark="rows are shuffled every epoch, from rng.seed"),
        Foreign("dataset_prepared_path overwrite_cache", "AL",
                remark="prepared rows are cached by themselves; AUTOMODEL_CACHE names the place"),
    ),
    "Batch and length of a run": (
        Foreign("per_device_train_batch_size micro_batch_size batch_size dataloader.batch_size", "TALUN",
                "step_scheduler.local_batch_size={}", "rows of a micro-batch on each rank"),
        Foreign("gradient_accumulation_steps grad_acc_steps step_scheduler.grad_acc_steps", "TALUN", _GLOBAL,
                _ACCUMULATION),
        Foreign("total_batch_size", "T", "step_scheduler.global_batch_size={}", "over all ranks"),
        Foreign("num_train_epochs num_epochs epochs max_epochs", "TALU", "step_scheduler.num_epochs={}",
                "a whole number"),
        Foreign("max_steps max_steps_per_epoch", "TALU", "step_scheduler.max_steps={}",
                "optimizer steps of the whole run"),
        Foreign("logging_steps log_every_n_steps", "TALU", "step_scheduler.log_every_steps={}"),
        Foreign("eval_steps run_val_every_n_steps", "TALU",
                "step_scheduler.val_every_steps={}", "optimizer steps"),
        Foreign("eval_strategy evaluation_strategy do_eval evals_per_epoch", "TAL",
                remark="there is validation where there is a validation_dataset; step_scheduler.val_every_steps"),
        Foreign("per_device_eval_batch_size eval_batch_size", "TAL", "evaluation.batch_size={}",
                "of generated answers; a loss takes step_scheduler.local_batch_size"),
        Foreign("early_stopping_patience", "TA", remark="no early stop; checkpoint.keep_best keeps the best"),
    ),
    "Optimizer": (
        Foreign("learning_rate lr optimizer.learning_rate", "TALUN", "optimizer.lr={}"),
        Foreign("optim optimizer._component_", "TAU", "optimizer=adamw",
                f"or sgd, adafactor, muon, adamw_8bit; {_OWN_CODE}"),
        Foreign("_component_", "U", remark="a class or function is named by _target_"),
        Foreign("adam_beta1 adam_beta2", "TAL", "optimizer.betas=[0.9,0.999]", "both in one list"),
        Foreign("adam_epsilon", "TAL", "optimizer.eps={}"),
        Foreign("weight_decay", "TALUN", "optimizer.weight_decay={}", "norms and biases are never decayed"),
        Foreign("lr_scheduler_type lr_scheduler._component_ lr_scheduler.lr_decay_style lr_decay_style", "TALUN",
                "lr_scheduler={}", "cosine, linear or constant"),
        Foreign("warmup_ratio", "TAL", "lr_scheduler.warmup_ratio={}"),
        Foreign("warmup_steps num_warmup_steps lr_warmup_steps", "TALUN", "lr_scheduler.warmup_steps={}"),
        Foreign("min_lr lr_scheduler.min_lr cosine_min_lr_ratio min_lr_ratio", "AN", "lr_scheduler.min_lr_ratio=...",
                "a share of optimizer.lr"),
        Foreign("max_grad_norm gradient_clipping clip_grad_norm", "TALU", "clip_grad_norm.max_norm={}"),
        Foreign("neftune_noise_alpha neftune", "TALN", remark="no noise on embeddings"),
        Foreign("label_smoothing_factor label_smoother", "T",
                "loss_fn.label_smoothing={}"),
        Foreign("galore use_galore use_badam use_apollo", "AL",
                remark=f"adamw or sgd; {_OWN_CODE}: optimizer._target_"),
    ),
    "Ranks and memory": (
        Foreign("num_processes nproc_per_node num_gpus", "TUN", "launch.nproc_per_node={}"),
        Foreign("deepspeed fsdp fsdp_config fsdp_version", "TAL", "distributed=fsdp2",
                "ZeRO stages 1 to 3 on CUDA: distributed=megatron_fsdp"),
        Foreign("distributed.strategy", "N", "distributed={}", "ddp, fsdp2 or megatron_fsdp"),
        Foreign("distributed.dp_size dp_size data_parallel_shard_dim", "UN",
                remark="it follows from the number of ranks"),
        Foreign("data_parallel_replicate_dim", "U", "distributed.dp_replicate_size={}"),
        Foreign("tensor_parallel_dim tensor_parallel_size", "AU", "distributed=fsdp2 distributed.tp_size={}"),
        Foreign("distributed.cp_size cp_size context_parallel_size sequence_parallel_degree pp_size", "TAN",
                remark="data parallel, sharding and tensor parallel alone"),
        Foreign("fsdp_cpu_offload cpu_offload", "UA", "distributed=fsdp2 distributed.cpu_offload={}"),
        Foreign("gradient_checkpointing activation_checkpointing enable_activation_checkpointing", "TALUN",
                "distributed.activation_checkpointing={}"),
        Foreign("gradient_checkpointing_kwargs", "TA",
                remark="distributed.activation_checkpointing: true, selective, or every nth layer"),
        Foreign("enable_activation_offloading activation_offloading", "TAU", "distributed.activation_offload={}"),
        Foreign("ddp_find_unused_parameters ddp_bucket_cap_mb", "TA", remark="nothing of the kind is needed"),
        Foreign("ddp_timeout", "TAL", "dist_env.timeout_minutes=...", "minutes instead of seconds"),
        Foreign("ddp_backend", "T", "dist_env.backend={}"),
        Foreign("torch_compile compile", "TAUN", remark="nothing is compiled"),
    ),
    "Checkpoints and logs": (
        Foreign("save_steps save_every_n_steps", "TALU", "step_scheduler.ckpt_every_steps={}",
                "optimizer steps"),
        Foreign("save_strategy save_only_model saves_per_epoch", "TAL",
                remark="step_scheduler.ckpt_every_steps, checkpoint.enabled"),
        Foreign("save_total_limit", "TAL", "checkpoint.keep_last={}"),
        Foreign("load_best_model_at_end metric_for_best_model", "TAL", "checkpoint.keep_best=min:loss"),
        Foreign("resume_from_checkpoint auto_resume_from_checkpoints", "TALU", "checkpoint.resume={}",
                "auto, never or a folder"),
        Foreign("overwrite_output_dir", "TL", remark="nothing is overwritten: choose another output_dir"),
        Foreign("checkpoint.checkpoint_dir checkpoint_dir", "N", "output_dir={}"),
        Foreign("checkpoint.model_save_format save_safetensors safe_serialization", "TALN",
                remark="weights are always written as safetensors"),
        Foreign("checkpoint.save_consolidated save_consolidated", "N", "export.enabled={}"),
        Foreign("push_to_hub hub_model_id hub_strategy", "TA",
                remark="upload RUN/model with: hf upload OWNER/NAME RUN/model"),
        Foreign("seed data_seed", "TALUN", "rng.seed={}"),
        Foreign("full_determinism", "TL", "rng.deterministic={}"),
        Foreign("report_to", "TAL", "logger=[jsonl,wandb]"),
        Foreign("wandb_project wandb.project", "AN", "logger=[jsonl,wandb] logger.wandb.project={}"),
        Foreign("wandb_entity wandb.entity", "AN", "logger=[jsonl,wandb] logger.wandb.entity={}"),
        Foreign("run_name wandb_name wandb.name", "TALN", "logger=[jsonl,wandb] logger.wandb.name={}"),
        Foreign("logging_dir log_dir", "TU", "output_dir={}", "everything of a run lies there"),
        Foreign("stage rl", "AL", "recipe=llm_sft", "python -m automodel.run --help lists the recipes"),
        Foreign("do_train do_predict", "TL", remark="python -m automodel.run trains; the other commands do the rest"),
    ),
}  # fmt: skip

_BY_NAME = {name: each for section in SECTIONS.values() for each in section for name in each.names.split()}


def find_foreign(key: str) -> Foreign | None:
    """Return the entry for a key of another tool, in any section; dashes count as underscores."""
    parts = key.replace("-", "_").split(".")
    return next((_BY_NAME[name] for name in _ends(parts) if name in _BY_NAME), None)


def _ends(parts: list[str]) -> Iterator[str]:
    return (".".join(parts[start:]) for start in range(len(parts)))
