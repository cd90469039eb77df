"""The rows that a recipe trains and is validated on, from the configuration: one source, a mixture, or a stream."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from automodel.config import Config
from automodel.data.batches.loader import Collate, Loader
from automodel.data.batches.mixture import MixtureDataset
from automodel.data.batches.stream import Stream, StreamLoader
from automodel.data.batches.train_set import TrainSet, build_train_set
from automodel.data.chat.stops import Stops
from automodel.data.formats.choose import choose_for_file
from automodel.data.prepare.bad_rows import warn_of_skipped
from automodel.data.prepare.cache import hash_of
from automodel.data.prepare.checks import Problem, data_problems
from automodel.data.prepare.load import load_rows, row_preparer
from automodel.data.prepare.options import smaller_limit
from automodel.data.prepare.prepared import PreparedRows
from automodel.data.validation_share import split_off
from automodel.logs import get_logger, warn_for_all
from automodel.models.embeddings import require_embeddings
from automodel.models.hf import head_labels, pad_token_id
from automodel.runner.build import build
from automodel.types import UserError

if TYPE_CHECKING:
    from automodel.runner.job import Job
    from automodel.tasks.task import Task

log = get_logger(__name__)

SAMPLE_ROWS = 200
"""Rows of a stream that are checked before training."""


@dataclass(frozen=True)
class TrainingData:
    """What a run trains and is validated on.

    Attributes:
        task: fitted to the rows.
        sources: the rows of every training source by name; of a stream, only its first rows.
        train_set: None for a stream.
        pack_length: the tokens of a pack, or None.
    """

    cfg: Config
    task: Task
    sources: dict[str, PreparedRows]
    validation: PreparedRows | None
    train_set: TrainSet | None
    stream: Stream | None
    pack_length: int | None

    @property
    def _sets(self) -> list[PreparedRows]:
        return [*self.sources.values(), *([self.validation] if self.validation is not None else [])]

    @property
    def fingerprint(self) -> str:
        if self.train_set is not None:
            return self.train_set.fingerprint
        (sample,) = self.sources.values()
        facts = {"first rows": sample.fingerprint, "block": self.stream.source.buffer_rows, "pack": self.pack_length}
        return hash_of(facts)[:16]

    @property
    def stops(self) -> Stops:
        """The ends of answers that the rows supervise."""
        return Stops.union(rows.stops for rows in self._sets)

    @property
    def num_rows(self) -> int | None:
        return None if self.train_set is None else self.train_set.num_drawn

    def problems(self) -> list[Problem]:
        """Return what would train wrongly."""
        found = [line for rows in self.sources.values() for line in data_problems(rows, self.validation)]
        return found + [Problem(line, is_sure=True) for rows in self._sets for line in rows.proof.differences]

    def loader(self, job: Job, collate: Collate) -> Loader:
        """Return the loader of this rank; every rank must call it."""
        import torch.distributed as dist

        from automodel.data.batches.loader import TrainLoader
        from automodel.distributed.runtime.first_rank import node_group

        cfg, train_set = self.cfg, self.train_set
        place = {"dp_rank": job.dp.rank, "dp_size": job.dp.size, "pin_memory": job.dist_info.device.type == "cuda"}
        if self.stream is not None:
            return StreamLoader(
                self.stream,
                collate=collate,
                local_batch_size=cfg.step_scheduler.local_batch_size,
                sort_within_step=cfg.dataloader.sort_within_step,
                node_group=node_group() if dist.get_world_size() > 1 else None,
                num_workers=cfg.dataloader.num_workers,
                **place,
            )
        return TrainLoader(
            train_set.items,
            collate=collate,
            global_batch_size=cfg.step_scheduler.global_batch_size,
            local_batch_size=cfg.step_scheduler.local_batch_size,
            seed=cfg.rng.seed,
            num_epochs=cfg.step_scheduler.num_epochs,
            lengths=train_set.lengths,
            draw=train_set.draw,
            num_drawn=train_set.num_drawn,
            **cfg.dataloader.model_dump(),
            **place,
        )


def load_data(cfg: Config, task: Task, model: Any, tokenizer: PreTrainedTokenizerBase) -> TrainingData:
    """Prepare the rows that ``cfg`` names, or take them from the cache.

    Args:
        task: the recipe's, perhaps still to be fitted to the rows.
        model: what the ``model`` section builds.
    """
    limit = model.max_length()
    source, set_aside = split_off(build(cfg.dataset), cfg.dataset.get("validation_share"), seed=cfg.rng.seed)
    mixture = source if isinstance(source, MixtureDataset) else None
    parts = mixture.parts() if mixture is not None else {source.display_name: source}
    if source.streaming:
        if not task.can_stream:
            raise UserError(
                f"dataset.streaming=true does not apply to recipe={cfg.recipe.name}, which must know all rows first"
            )
        parts = {name: dataclasses.replace(part, limit=SAMPLE_ROWS) for name, part in parts.items()}
    rows = _load_parts(parts, tokenizer, task, limit)
    held_out = _load_validation(set_aside, tokenizer, task, limit)
    all_rows = [*rows.values(), *([] if held_out is None else [held_out])]
    task = task.fitted(all_rows, head_labels=head_labels(model))
    rows = {name: dataclasses.replace(each, task=task) for name, each in rows.items()}
    if held_out is not None:
        validation = dataclasses.replace(held_out, task=task)
    else:
        validation = _load_validation(build(cfg.validation_dataset), tokenizer, task, limit)
    all_rows = [*rows.values(), *([] if validation is None else [validation])]
    largest_id = len(tokenizer) - 1 if source.streaming else max(each.counts.largest_id for each in all_rows)
    require_embeddings(model, tokenizer, largest_id=max(largest_id, pad_token_id(tokenizer)))
    pack_length, train_set, stream = _pack_length(cfg, limit), None, None
    if source.streaming:
        stream = _stream(cfg, source, tokenizer, task, limit, pack_length, rows)
    else:
        train_set = build_train_set(rows, pack_length=pack_length, mixture=mixture, seed=cfg.rng.seed)
    return TrainingData(cfg, task, rows, validation, train_set, stream, pack_length)


def _load_validation(
    source: Any, tokenizer: PreTrainedTokenizerBase, task: Task, model_max_length: int | None
) -> PreparedRows | None:
    if source is None:
        return None
    return load_rows(source, tokenizer, task, model_max_length=model_max_length, keeps_prompts=True)


def _load_parts(
    parts: dict[str, Any], tokenizer: PreTrainedTokenizerBase, task: Task, model_max_length: int | None
) -> dict[str, PreparedRows]:
    """Prepare every source with its own chat template; the tokenizer keeps that of the first which has one."""
    own_template = tokenizer.chat_template
    rows, templates = {}, {}
    for name, part in parts.items():
        tokenizer.chat_template = own_template
        rows[name] = load_rows(part, tokenizer, task, model_max_length=model_max_length)
        warn_of_skipped(rows[name].name, rows[name].counts)
        if rows[name].is_conversation:
            templates[name] = tokenizer.chat_template
    tokenizer.chat_template = next(iter(templates.values()), own_template)
    if len(set(templates.values())) > 1:
        first = next(iter(templates))
        warn_for_all(log, "the sources are rendered by different chat templates; the export gets that of %s", first)
    return rows


def _pack_length(cfg: Config, model_max_length: int | None) -> int | None:
    if not cfg.packing.enabled:
        return None
    return smaller_limit(cfg.packing.max_length or cfg.dataset.get("max_length", 2048), model_max_length)


def _stream(
    cfg: Config,
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    limit: int | None,
    pack_length: int | None,
    sample: dict[str, PreparedRows],
) -> Stream:
    options = source.options(limit)
    reader = choose_for_file(source.stream(), options.format, options.columns, samples=task.samples)
    return Stream(
        source,
        row_preparer(tokenizer, reader, options, task),
        options,
        seed=cfg.rng.seed,
        global_batch_size=cfg.step_scheduler.global_batch_size,
        num_epochs=cfg.step_scheduler.num_epochs,
        drop_last=cfg.dataloader.drop_last,
        pack_length=pack_length,
        reported_fields={field for rows in sample.values() for field in rows.counts.unused},
    )
