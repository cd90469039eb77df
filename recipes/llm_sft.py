"""Supervised fine-tuning of a causal language model: only the answers are trained on."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase

from automodel.data.collate import CausalLMCollator
from automodel.data.loader import validation_batches
from automodel.data.prepare import load_sft
from automodel.data.rows import SFTRows
from automodel.distributed.mesh import dp_eval_sample_shard
from automodel.distributed.ordering import everywhere
from automodel.distributed.watchdog import mark
from automodel.eval.generation import GenerationEvaluation, GenerationScores
from automodel.eval.validation import Validation, measure_loss, validate
from automodel.logs import get_logger
from automodel.models.hf import pad_token_id
from automodel.recipes.assembly import Job, as_text, build, build_loop, log_where_and_next, train_and_export
from automodel.train.loop import Evaluator

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
    mark("loading the rows")
    source = build(cfg.model)
    tokenizer = job.load_tokenizer(source)
    train_rows, validation_rows = everywhere(lambda: _load_rows(job, source, tokenizer))
    model = job.build_model(lambda: source.build(tokenizer), task="CAUSAL_LM")

    loss_fn = build(cfg.loss_fn)
    collate = CausalLMCollator(pad_token_id(tokenizer), job.strategy.length_multiple)
    scores: list[GenerationScores] = []
    evaluators: list[Evaluator] = []
    if validation_rows is not None:
        evaluator = _Evaluator(job, model, tokenizer, rows=validation_rows, collate=collate, loss_fn=loss_fn)
        evaluators.append(Evaluator("validation", lambda: evaluator.run(scores)))
    loop = build_loop(
        job,
        model,
        rows=train_rows.examples,
        collate=collate,
        loss_fn=loss_fn,
        evaluators=evaluators,
        fingerprint=train_rows.fingerprint,
    )
    if cfg.evaluation and loop.steps.step == 0:
        loop.evaluate()
    train_and_export(job, loop, tokenizer=tokenizer)
    if scores:
        _report(scores)
    log_where_and_next(job, next_steps=_NEXT_AFTER_DEMO if source.name == "demo" else ())


def _load_rows(job: Job, source: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[SFTRows, SFTRows | None]:
    limit = source.max_length()
    train_rows = load_sft(build(job.cfg.dataset), tokenizer, model_max_length=limit)
    validation_set = build(job.cfg.validation_dataset)
    if validation_set is None:
        return train_rows, None
    return train_rows, load_sft(validation_set, tokenizer, model_max_length=limit)


class _Evaluator:
    """The validation loss and, where configured, the scores of generated answers."""

    def __init__(
        self,
        job: Job,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        rows: SFTRows,
        collate: CausalLMCollator,
        loss_fn: Any,
    ) -> None:
        self.job, self.model, self.tokenizer, self.rows = job, model, tokenizer, rows
        self.generation: GenerationEvaluation | None = build(job.cfg.evaluation)
        self.validation = Validation(
            "validation",
            batches=lambda: validation_batches(
                rows.examples,
                collate=collate,
                batch_size=job.cfg.step_scheduler.local_batch_size,
                dp_rank=job.dp.rank,
                dp_size=job.dp.size,
            ),
            measure=measure_loss(loss_fn),
        )

    def run(self, scores: list[GenerationScores]) -> dict[str, Any]:
        """Return the validation record's entries, and append to ``scores`` what generation gave."""
        job = self.job
        record = validate(
            self.model, self.validation, device=job.dist_info.device, dp_group=job.dp.group, autocast=job.autocast
        )
        if self.generation is None:
            return record
        scores.append(
            self.generation.run(
                self.model,
                self.tokenizer,
                prompts=self.rows.prompts,
                sample_shard=dp_eval_sample_shard(job.strategy, job.dp.rank, job.dp.size),
                device=job.dist_info.device,
                dp_group=job.dp.group,
            )
        )
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
