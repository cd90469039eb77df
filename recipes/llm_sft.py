"""Supervised fine-tuning of a causal language model: only the answers are trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from automodel.data.batches.collate import CausalLMCollator, PackedCollator
from automodel.data.batches.loader import ValidationBatches
from automodel.data.batches.train_set import TrainSet
from automodel.distributed.parallel.handle import unwrap
from automodel.distributed.parallel.strategy import dp_eval_sample_shard
from automodel.distributed.runtime.agreement import StopPoll, run_on_all_ranks
from automodel.distributed.runtime.watchdog import set_phase
from automodel.eval.generation import GenerationEvaluation, GenerationScores
from automodel.eval.validation import Validation, measure_loss, validate
from automodel.logs import get_logger
from automodel.losses.cross_entropy import forward_logits
from automodel.models.hf import pad_token_id, stop_at
from automodel.models.isolation import require_isolation
from automodel.runner.job import Job, build, build_loop, train_and_export
from automodel.runner.summary import as_text, log_where_and_next
from automodel.runner.training_data import SFTData, prepare_sft_data
from automodel.train.loop import Evaluator
from automodel.types import UserError

log = get_logger(__name__)

_NEXT_AFTER_DEMO = (
    "python -m automodel.run model=hf model.pretrained_model_name_or_path=DIR_OR_HUB_ID dataset=jsonl "
    "dataset.path=YOUR_ROWS.jsonl",
    "python -m automodel.run launch.nproc_per_node=2 distributed=fsdp2 step_scheduler.local_batch_size=16",
    "python -m automodel.run --help",
)


def run(job: Job) -> None:
    """Train, validate and export as ``job.cfg`` says; every rank must call it."""
    cfg = job.cfg
    set_phase("loading the rows")
    source = build(cfg.model)
    tokenizer = job.load_tokenizer(source)
    data = prepare_sft_data(job, source, tokenizer)
    model = job.build_model(source, tokenizer, task="CAUSAL_LM")
    stop_at(unwrap(model), tokenizer, data.stops.ids)

    loss_fn = build(cfg.loss_fn)
    collate = CausalLMCollator(pad_token_id(tokenizer), job.strategy.length_multiple)
    train_collate = collate if data.pack_length is None else _packed_collator(job, model, tokenizer)
    scores: list[GenerationScores] = []
    evaluators: list[Evaluator] = []
    if data.validation is not None:
        evaluator = _Evaluator(job, model, tokenizer, data=data, collate=collate, loss_fn=loss_fn)
        evaluators.append(Evaluator("validation", lambda poll: evaluator.run(scores, poll)))
    loop = build_loop(
        job,
        model,
        loader=data.loader(job, train_collate),
        num_rows=data.num_rows,
        loss_fn=loss_fn,
        evaluators=evaluators,
        fingerprint=data.fingerprint,
    )
    if data.train_set is not None and (len(data.sources) > 1 or data.pack_length):
        log.info("an epoch\n%s", as_text(_shares(data.train_set)))
    train_and_export(job, loop, tokenizer=tokenizer)
    if scores:
        _report(scores)
    log_where_and_next(job, model, next_steps=_NEXT_AFTER_DEMO if source.name == "demo" else ())


def _packed_collator(job: Job, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> PackedCollator:
    """Return the collator of packs, once it is shown that this model keeps their documents apart."""
    set_phase("checking that packed documents do not see each other")
    attention = unwrap(model).config._attn_implementation
    collate = PackedCollator(pad_token_id(tokenizer), job.strategy.length_multiple, attention)
    if attention == "flex_attention" and job.dist_info.device.type == "cpu":
        raise UserError("model.attn_implementation=flex_attention has no backward on a CPU; choose sdpa")
    run_on_all_ranks(
        lambda: require_isolation(
            model,
            collate=collate,
            forward=forward_logits,
            vocab_size=len(tokenizer),
            device=job.dist_info.device,
            autocast=job.autocast,
            attention=attention,
        )
    )
    return collate


def _shares(train_set: TrainSet) -> Table:
    """Say what each source gives to an epoch."""
    total = sum(share.num_tokens for share in train_set.shares)
    table = Table("source", "rows", "drawn", "share", "tokens", "share", "slots filled")
    for share in train_set.shares:
        table.add_row(
            Path(share.name).name,
            f"{share.num_rows:,}",
            f"{share.num_drawn:,}",
            f"{share.num_drawn / train_set.num_drawn:.1%}",
            f"{share.num_tokens:,.0f}",
            f"{share.num_tokens / total:.1%}",
            "" if share.efficiency is None else f"{share.efficiency:.1%}",
        )
    return table


class _Evaluator:
    """The validation loss and, where configured, the scores of generated answers."""

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        data: SFTData,
        collate: CausalLMCollator,
        loss_fn: Any,
    ) -> None:
        self.job, self.model, self.tokenizer, self.data = job, model, tokenizer, data
        self.generation: GenerationEvaluation | None = build(job.cfg.evaluation)
        self.validation = Validation(
            "validation",
            batches=ValidationBatches(
                data.validation.examples,
                collate=collate,
                batch_size=job.cfg.step_scheduler.local_batch_size,
                dp_rank=job.dp.rank,
                dp_size=job.dp.size,
            ),
            measure=measure_loss(loss_fn),
        )

    def run(self, scores: list[GenerationScores], poll: StopPoll) -> dict[str, Any]:
        """Return the validation record's entries, and append to ``scores`` what generation gave."""
        job = self.job
        place = {"device": job.dist_info.device, "dp_group": job.dp.group, "autocast": job.autocast}
        record = validate(self.model, self.validation, **place, poll=poll)
        if self.generation is None:
            return record
        with job.autocast():
            given = self.generation.run(
                self.model,
                self.tokenizer,
                prompts=self.data.validation.prompts,
                sample_shard=dp_eval_sample_shard(job.strategy, job.dp.rank, job.dp.size),
                **place,
                stops=self.data.stops,
                poll=poll,
            )
        scores.append(given)
        return record | scores[-1].metrics()


def _report(scores: list[GenerationScores]) -> None:
    """Say what was learned: exact match before and after, and some answers."""
    first, last = scores[0], scores[-1]
    table = Table("exact match", "before", "after")
    for kind in last.by_kind:
        table.add_row(kind, f"{first.by_kind[kind]:.2f}", f"{last.by_kind[kind]:.2f}")
    table.add_row("all", f"{first.exact_match:.2f}", f"{last.exact_match:.2f}")
    answers = Table("held-out question", "right answer", "the model's answer")
    for question, right, answer in last.samples:
        answers.add_row(question.strip(), right.strip(), answer.strip())
    log.info("what was learned\n%s\n%s", as_text(table), as_text(answers))
