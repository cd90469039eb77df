"""Sequence classification: a label for each text, scored by accuracy and macro F1."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from automodel.config import Config
from automodel.data.batches.collate import ClassificationCollator
from automodel.data.batches.loader import ValidationBatches
from automodel.data.prepare.checks import Problem, row_problems, settle, shared_problems
from automodel.data.prepare.load import load_classification
from automodel.data.prepare.prepared import ClassificationRows
from automodel.data.validation_share import split_off
from automodel.distributed.runtime.first_rank import FirstRankPerNode
from automodel.distributed.runtime.watchdog import set_phase
from automodel.eval.validation import Validation, measure_classification, summarize_classification, validate
from automodel.models.embeddings import require_embeddings
from automodel.models.hf import head_labels, pad_token_id
from automodel.runner.job import Job, build, build_loop, train_and_export
from automodel.runner.summary import log_where_and_next
from automodel.train.loop import Evaluator


def run(job: Job) -> None:
    """Train, validate and export as ``job.cfg`` says; every rank must call it."""
    cfg, info = job.cfg, job.dist_info
    set_phase("loading the rows")
    source = build(cfg.model)
    tokenizer = job.load_tokenizer(source)
    with FirstRankPerNode():
        train_rows, validation_rows = load_rows(job.cfg, source, tokenizer)
    settle(problems_of(train_rows, validation_rows), job.cfg.data_checks)
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


def load_rows(
    cfg: Config, source: Any, tokenizer: PreTrainedTokenizerBase
) -> tuple[ClassificationRows, ClassificationRows | None]:
    """Prepare the rows that ``cfg`` names for training and for validation, if any, or take them from the cache.

    Args:
        source: what the ``model`` section builds.
    """
    limit = source.max_length()
    source_rows, set_aside = split_off(build(cfg.dataset), cfg.dataset.get("validation_share"), seed=cfg.rng.seed)
    train_rows = load_classification(
        source_rows, tokenizer, model_max_length=limit, set_aside=set_aside, head_labels=head_labels(source)
    )
    validation_set = set_aside or build(cfg.validation_dataset)
    validation_rows = None
    if validation_set is not None:
        validation_rows = load_classification(validation_set, tokenizer, model_max_length=limit, known=train_rows)
    largest_id = max(rows.counts.largest_id for rows in (train_rows, validation_rows) if rows is not None)
    require_embeddings(source, tokenizer, largest_id=max(largest_id, pad_token_id(tokenizer)))
    return train_rows, validation_rows


def problems_of(train_rows: ClassificationRows, validation_rows: ClassificationRows | None) -> list[Problem]:
    """Return what would train wrongly."""
    problems = row_problems(train_rows)
    return problems if validation_rows is None else problems + shared_problems(train_rows, validation_rows)
