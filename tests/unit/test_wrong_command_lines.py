"""Every mistake on a command line has a message that names it, before torch is imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from automodel.config import load_config
from automodel.types import UserError

ROOT = Path(__file__).parents[2]
JSONL = "dataset=jsonl dataset.path=README.md"


def problems_of(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(list(argv), env={})
    return "\n".join(caught.value.problems)


WRONG = [
    ("step_scheduler.max_step=3", "step_scheduler.max_step is not a known key; did you mean step_scheduler.max_steps?"),
    ("max_steps=5", "did you mean step_scheduler.max_steps?"),
    ("lr=1e-4", "did you mean optimizer.lr?"),
    ("optimiser.lr=1", "did you mean optimizer.lr?"),
    ("optimizer.learning_rate=1", "optimizer.learning_rate is not an option of adamw; write optimizer.lr=1"),
    ("distribute=fsdp2", "did you mean distributed?"),
    ("distributed=fsdp", "distributed=fsdp: no such option; there are: ddp, fsdp2, megatron_fsdp; did you mean fsdp2?"),
    ("recipe=llm_sff", "did you mean llm_sft?"),
    ("modle=hf", "did you mean model"),
    ("logger=[jsonl,wandbb]", "logger=wandbb: no such option"),
    ("experiment=nope", "experiment=nope: no such option"),
    ("distributed.reshard_after_forward=false", "is not an option of DDP; distributed=fsdp2 has it"),
    ("distributed.dp_replicate_size=2", "distributed=fsdp2 has it"),
    ("distributed=fsdp2 distributed.dp_replicate_size=2", "distributed.dp_replicate_size=2 must divide"),
    ("distributed=fsdp2 distributed.tp_size=3", "distributed.tp_size=3 must divide the number of ranks, 1"),
    ("distributed=fsdp2 distributed.tp_size=0", "distributed.tp_size=0 must be at least 1"),
    ("distributed.tp_size=2", "distributed.tp_size is not an option of DDP; distributed=fsdp2 has it"),
    ("distributed.zero_stage=2", "distributed.zero_stage is not an option of DDP; distributed=megatron_fsdp has it"),
    ("distributed=fsdp2 distributed.sequence_parallel=true", "set distributed.tp_size"),
    ("distributed=megatron_fsdp distributed.zero_stage=4", "distributed.zero_stage=4 must be one of 1, 2 or 3"),
    ("distributed=megatron_fsdp distributed.shard_optimizer_over_replicas=true", "set distributed.dp_replicate_size"),
    ("dataset=jsonl dataset.path=[]", "dataset.path=[] names no file"),
    ("dataset=jsonl dataset.path=[none.jsonl]", "dataset.path=none.jsonl: there is no such file"),
    (f"{JSONL} dataset.validation_share=0", "dataset.validation_share=0 must be more than 0"),
    (f"{JSONL} dataset.validation_share=5%", "dataset.validation_share=5% must be a number"),
    (
        f"{JSONL} dataset.validation_share=0.1 validation_dataset=jsonl validation_dataset.path={{rows}}",
        "dataset.validation_share=0.1 and a validation_dataset: choose one of them",
    ),
    (f"{JSONL} dataset.validation_share=0.1 dataset.streaming=true", "does not go with dataset.streaming=true"),
    (
        f"{JSONL} validation_dataset=jsonl validation_dataset.path={{rows}} validation_dataset.validation_share=0.1",
        "validation_dataset.validation_share: dataset.validation_share sets aside rows of the training set",
    ),
    ("dataset=mixture dataset.sources.a.validation_share=0.1", "dataset.sources.a.validation_share: a mixture has"),
    ("peft=lora", "this model has fresh ones: choose model=hf"),
    ("peft=qdora", "peft=qdora: no such option; there are: dora, lora, none, qlora"),
    ("peft=qlora", "needs a CUDA device and the package bitsandbytes"),
    ("peft=lora peft.rank=0", "peft.rank=0 must be at least 1"),
    ("peft=lora peft.dropout=1.5", "peft.dropout=1.5 must be less than 1"),
    ("peft=dora distributed=fsdp2 distributed.tp_size=2 launch.nproc_per_node=2", "use peft=lora"),
    ("recipe=llm_dpo", "recipe=llm_dpo: no such option; there are: llm_seq_cls, llm_sft"),
    ("compile.enabled=true", "compile.enabled is not a known key"),
    ("packing.enabld=true", "packing.enabld is not a known key; did you mean packing.enabled?"),
    ("recipe=llm_seq_cls packing.enabled=true", "packing.enabled=true does not apply to recipe=llm_seq_cls"),
    ("packing.enabled=true dataloader.max_tokens_per_batch=9", "choose one; packs already have one length"),
    ("data_checks=off", "data_checks=off must be one of auto, strict or warn"),
    ("dataset=jsonl dataset.path=README.md dataset.streaming=true", "needs step_scheduler.max_steps"),
    (
        "dataset=jsonl dataset.path=README.md dataset.streaming=true step_scheduler.max_steps=1 "
        "dataloader.length_grouped=true",
        "dataloader.length_grouped does not go with dataset.streaming=true",
    ),
    ("dataset=jsonl dataset.path=README.md dataset.on_bad_row=drop", "dataset.on_bad_row=drop must be one of stop"),
    ("dataset=jsonl dataset.path=README.md dataset.num_proc=0", "dataset.num_proc=0 must be at least 1"),
    ("step_scheduler.max_steps=abc", "step_scheduler.max_steps=abc must be a whole number"),
    ("step_scheduler.max_steps=0", "step_scheduler.max_steps=0 must be at least 1"),
    ("step_scheduler.max_steps=true", "step_scheduler.max_steps=true must be a whole number"),
    ("step_scheduler.global_batch_size=1.5", "must be a whole number"),
    ("step_scheduler=5", "step_scheduler=5 must be a section of keys"),
    ("step_scheduler.max_steps=[1,2]", "must be a whole number"),
    ("rng.deterministic=1", "rng.deterministic=1 must be true or false"),
    ("rng.seed=-1", "rng.seed=-1 must be at least 0"),
    ("on_non_finite=stopp", "must be one of stop or skip; did you mean stop?"),
    ("model.dtype=float16", "must be one of auto, float32 or bfloat16"),
    ("model.dtype=float32 distributed.mixed_precision=pure_bf16", "trains bf16 weights, not model.dtype=float32"),
    ("peft=lora distributed.mixed_precision=pure_bf16", "adapters are trained in float32; choose bf16 with peft"),
    ("peft=lora model.dtype=bfloat16 distributed.mixed_precision=float32", "leave one of them at auto"),
    ("distributed=megatron_fsdp distributed.mixed_precision=pure_bf16", "must be one of auto, bf16 or float32"),
    ("dataset.truncation=rigth", "did you mean right?"),
    ("distributed.mixed_precision=fp8", "must be one of auto, bf16, float32 or pure_bf16"),
    (
        "distributed.activation_checkpointing=ful",
        "activation_checkpointing=ful must be true or false or one of full or selective or a whole number; did you",
    ),
    (
        "distributed.activation_offload=true distributed.activation_checkpointing=selective",
        "choose activation_checkpointing=full or false",
    ),
    ("optimizer=adafactor distributed=fsdp2", "does not take the sharded weights of distributed=fsdp2"),
    ("optimizer=muon distributed=megatron_fsdp", "choose distributed=ddp or fsdp2, or optimizer=adamw"),
    ("optimizer=adafactor optimizer.beta2_decay=0.5", "must be at most 0"),
    ("dist_env.backend=ncll", "did you mean nccl?"),
    ("dist_env.timeout_minutes=0", "must be more than 0"),
    ("optimizer.lr=abc", "optimizer.lr=abc must be a number"),
    ("optimizer.lr=0", "optimizer.lr=0 must be more than 0"),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9] must be a list of 2 items"),
    ("optimizer.betas=[0.9,1.5]", "optimizer.betas.1=1.5 must be less than 1"),
    ("optimizer._target_=no_such.Thing", "optimizer._target_=no_such.Thing: cannot be imported"),
    ("lr_scheduler.warmup_ratio=2", "must be at most 1"),
    ("lr_scheduler.min_lr_ratio=1.5", "lr_scheduler.min_lr_ratio=1.5 must be at most 1"),
    ("recipe._target_=no_such.run", "recipe._target_=no_such.run: cannot be imported"),
    ("recipe._target_=automodel.recipes.no_such.run", "automodel.recipes.no_such.run: cannot be imported"),
    ("recipe._target_=os.getcwd", "recipe._target_=os.getcwd must return automodel.runner.recipe.Recipe, not str"),
    ("launch._target_=no_such.Launch", "launch._target_=no_such.Launch: cannot be imported"),
    ("launch._target_=types.SimpleNamespace", "launch._target_=types.SimpleNamespace must be a class with a method"),
    ("model=scratch +model.config.x={_target_:no_such.X}", "model.config.x._target_=no_such.X: cannot be imported"),
    ("dataset=jsonl", "dataset.path is required"),
    ("dataset=jsonl dataset.path=no/such/file.jsonl", "there is no such file"),
    ("dataset=jsonl dataset.path=x dataset.columns.promt=q", "did you mean dataset.columns.prompt?"),
    ("model=hf", "model.pretrained_model_name_or_path is required"),
    ("model=hf model.pretrained_model_name_or_path=./no/such", "there is no such folder"),
    ("model=hf model.pretrained_model_name_or_path=conf", "the folder has no config.json"),
    ("validation_dataset=none validation_dataset.path=x", "nothing is chosen for validation_dataset"),
    ("validation_dataset=none step_scheduler.val_every_steps=5 evaluation=loss", "there is no validation_dataset"),
    ("validation_dataset=none", "evaluation=generation needs rows to answer"),
    ("recipe=llm_seq_cls evaluation=generation", "evaluation=generation does not apply to recipe=llm_seq_cls"),
    ("checkpoint.resume=no/such", "there is no such folder"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last=0 must be at least 1"),
    ("checkpoint.keep_best=loss", "checkpoint.keep_best=loss must be min:NAME or max:NAME"),
    ("checkpoint.keep_best=min:loss validation_dataset=none evaluation=loss", "needs a validation_dataset"),
    (
        "checkpoint.keep_best=min:loss step_scheduler.ckpt_every_steps=3 step_scheduler.val_every_steps=2",
        "step_scheduler.val_every_steps=2 must divide step_scheduler.ckpt_every_steps=3",
    ),
    ("checkpoint.on_error=stpo", "must be one of stop or continue; did you mean stop?"),
    ("+step_scheduler.foo=1", "step_scheduler.foo is not a known key"),
    ("+nothing=1", "nothing is not a known key"),
    ("+optimizer.lrr=1", "optimizer.lrr is not an option of adamw; did you mean lr?"),
    ("~step_scheduler.num_epochs", "step_scheduler.num_epochs is missing"),
    ("--optimizer.lr=3", "write optimizer.lr=3, without dashes"),
    ("--optimizer.lr 3", "without dashes"),
    ("--no-such-flag", "--no-such-flag is not an option"),
    ("step_scheduler.max_steps", "write key=value"),
    ("model.dtype={a", "cannot be read"),
    ("-m optimizer.lr=1,x", "optimizer.lr=x must be a number"),
    ("launch.nproc_per_node=0", "must be at least 1"),
    ("launch.nproc_per_node=3", "is not divisible by local_batch_size 32 x data-parallel size 3"),
    ("--config-name=nope", "there is no nope.yaml"),
    ("--config-dir=no/such/folder", "is not a folder"),
]  # fmt: skip


@pytest.mark.parametrize(("command_line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_command_line_is_told_what_is_wrong(command_line, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert message in problems_of(*command_line.split())


OWN = """
class Loss:
    def __init__(self, gamma=1.0, delta=2.0):
        pass

    @staticmethod
    def problems(section, cfg, *, key, world_size):
        if section.get("gamma", 1) > section.get("delta", 2):
            yield f"{key}.gamma={section['gamma']} must not be more than {key}.delta; this job has {world_size} rank"
"""


def test_a_class_of_ones_own_checks_its_keys(tmp_path, monkeypatch):
    (tmp_path / "own_checks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_checks", raising=False)
    argv = ["loss_fn._target_=own_checks.Loss", "+loss_fn.gamma=3"]
    assert problems_of(*argv) == "loss_fn.gamma=3 must not be more than loss_fn.delta; this job has 1 rank"
    assert load_config([*argv, "+loss_fn.delta=4"], env={}).loss_fn["delta"] == 4
    assert "own_checks" not in problems_of(*argv, "rng.seed=x")  # imported only once nothing else is wrong
