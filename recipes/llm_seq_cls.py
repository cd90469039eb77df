"""Sequence classification: a label for each text, scored by accuracy and macro F1."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from automodel.data.collate import ClassificationCollator
from automodel.data.loader import ValidationBatches
from automodel.data.prepare import load_classification
from automodel.data.rows import ClassificationRows
from automodel.distributed.first_rank import FirstRankPerNode
from automodel.distributed.watchdog import mark
from automodel.eval.validation import Validation, measure_classification, summarize_classification, validate
from automodel.models.hf import pad_token_id
from automodel.recipes.assembly import Job, build, build_loop, train_and_export
from automodel.recipes.summary import log_where_and_next
from automodel.train.loop import Evaluator


def run(job: Job) -> None:
    """Train, validate and export as ``job.cfg`` says; every rank must call it."""
    cfg, info = job.cfg, job.dist_info
    mark("loading the rows")
    source = build(cfg.model)
    tokenizer = job.load_tokenizer(source)
    with FirstRankPerNode():
        train_rows, validation_rows = _load_rows(job, source, tokenizer)
    model = job.build_model(source, tokenizer, task="SEQ_CLS", label_names=train_rows.label_names)

    loss_fn = build(cfg.loss_fn)
    collate = ClassificationCollator(pad_token_id(tokenizer), job.strategy.length_multiple)
    evaluators: list[Evaluator] = []
    if validation_rows is not None:
        validation = Validation(
            "validation",
            batches=ValidationBatches(
                validation_rows.examples,
                collate=collate,
                batch_size=cfg.step_scheduler.local_batch_size,
                dp_rank=job.dp.rank,
                dp_size=job.dp.size,
            ),
            measure=measure_classification(loss_fn, len(train_rows.label_names)),
            summarize=summarize_classification,
        )
        place = {"device": info.device, "dp_group": job.dp.group}
        evaluators.append(
            Evaluator(
                validation.name,
                lambda poll: validate(model, validation, **place, autocast=job.autocast, poll=poll),
            )
        )
    loop = build_loop(
        job,
        model,
        loader=job.loader(train_rows.examples, collate=collate, lengths=train_rows.stats.lengths),
        num_rows=len(train_rows.examples),
        loss_fn=loss_fn,
        evaluators=evaluators,
        fingerprint=train_rows.fingerprint,
        resume_facts={"labels": list(train_rows.label_names)},
    )
    train_and_export(job, loop, tokenizer=tokenizer)
    log_where_and_next(job, model)


def _load_rows(
    job: Job, source: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[ClassificationRows, ClassificationRows | None]:
    limit = source.max_length()
    train_rows = load_classification(build(job.cfg.dataset), tokenizer, model_max_length=limit)
    validation_set = build(job.cfg.validation_dataset)
    if validation_set is None:
        return train_rows, None
    return train_rows, load_classification(
        validation_set, tokenizer, model_max_length=limit, label_names=train_rows.label_names
    )
