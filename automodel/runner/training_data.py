"""The rows of a language model's recipe, from the configuration: one source, a mixture, or a stream."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from automodel.config import Config
from automodel.data.batches.loader import Collate, Loader
from automodel.data.batches.mixture import MixtureDataset
from automodel.data.batches.stream import Stream, StreamLoader
from automodel.data.batches.train_set import TrainSet, build_train_set
from automodel.data.chat.stops import Stops
from automodel.data.prepare.cache import hash_of
from automodel.data.prepare.checks import Problem, data_problems, settle
from automodel.data.prepare.load import load_sft
from automodel.data.prepare.prepared import SFTRows
from automodel.data.prepare.preparers import SFTPreparer, choose_first, set_template, tell_skipped
from automodel.data.sources import shorter
from automodel.data.validation_share import split_off
from automodel.distributed.runtime.first_rank import FirstRankPerNode, node_group
from automodel.logs import get_logger, warn_for_all
from automodel.models.embeddings import require_embeddings
from automodel.models.hf import pad_token_id
from automodel.runner.job import Job, build

log = get_logger(__name__)

SAMPLE_ROWS = 200
"""Rows of a stream that are looked at before training."""


@dataclass(frozen=True)
class SFTData:
    """What a run trains and is validated on.

    Attributes:
        sources: the rows of every training source by name; of a stream, only its first rows.
        train_set: None for a stream.
        pack_length: the tokens of a pack, or None.
    """

    cfg: Config
    sources: dict[str, SFTRows]
    validation: SFTRows | None
    train_set: TrainSet | None
    stream: Stream | None
    pack_length: int | None

    @property
    def _sets(self) -> list[SFTRows]:
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
        cfg = self.cfg
        if self.stream is not None:
            return StreamLoader(
                self.stream,
                collate=collate,
                local_batch_size=cfg.step_scheduler.local_batch_size,
                dp_rank=job.dp.rank,
                dp_size=job.dp.size,
                node_group=node_group() if dist.get_world_size() > 1 else None,
                num_workers=cfg.dataloader.num_workers,
                pin_memory=job.dist_info.device.type == "cuda",
            )
        train_set = self.train_set
        return job.loader(
            train_set.items,
            collate=collate,
            lengths=train_set.lengths,
            draw=train_set.draw,
            num_drawn=train_set.num_drawn,
        )


def prepare_sft_data(job: Job, model: Any, tokenizer: PreTrainedTokenizerBase) -> SFTData:
    """Prepare the rows once per node, and look at them as ``data_checks`` says; every rank must call it."""
    with FirstRankPerNode():
        data = load_sft_data(job.cfg, model, tokenizer)
    settle(data.problems(), job.cfg.data_checks)
    return data


def load_sft_data(cfg: Config, model: Any, tokenizer: PreTrainedTokenizerBase) -> SFTData:
    """Prepare the rows that ``cfg`` names, or take them from the cache.

    Args:
        model: what the ``model`` section builds.
    """
    limit = model.max_length()
    source, set_aside = split_off(build(cfg.dataset), cfg.dataset.get("validation_share"), seed=cfg.rng.seed)
    mixture = source if isinstance(source, MixtureDataset) else None
    parts = mixture.parts() if mixture is not None else {source.display_name: source}
    if source.streaming:
        parts = {name: dataclasses.replace(part, limit=SAMPLE_ROWS) for name, part in parts.items()}
    rows = _load_parts(parts, tokenizer, limit)
    pack_length = _pack_length(cfg, limit)
    validation = set_aside or build(cfg.validation_dataset)
    validation_rows = None if validation is None else load_sft(validation, tokenizer, model_max_length=limit)
    sets = [*rows.values(), *([] if validation_rows is None else [validation_rows])]
    largest_id = len(tokenizer) - 1 if source.streaming else max(each.counts.largest_id for each in sets)
    require_embeddings(model, tokenizer, largest_id=max(largest_id, pad_token_id(tokenizer)))
    return SFTData(
        cfg=cfg,
        sources=rows,
        validation=validation_rows,
        train_set=None
        if source.streaming
        else build_train_set(rows, pack_length=pack_length, mixture=mixture, seed=cfg.rng.seed),
        stream=_stream(cfg, source, tokenizer, limit, pack_length, rows) if source.streaming else None,
        pack_length=pack_length,
    )


def _load_parts(
    parts: dict[str, Any], tokenizer: PreTrainedTokenizerBase, model_max_length: int | None
) -> dict[str, SFTRows]:
    """Prepare every source with its own chat template; the tokenizer keeps that of the first which has one."""
    own_template = tokenizer.chat_template
    rows, templates = {}, {}
    for name, part in parts.items():
        tokenizer.chat_template = own_template
        rows[name] = load_sft(part, tokenizer, model_max_length=model_max_length, keeps_prompts=False)
        tell_skipped(rows[name].name, rows[name].counts)
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
    return shorter(cfg.packing.max_length or cfg.dataset.get("max_length", 2048), model_max_length)


def _stream(
    cfg: Config,
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None,
    pack_length: int | None,
    sample: dict[str, SFTRows],
) -> Stream:
    options = source.options(limit)
    row_format = choose_first(source.stream(), options, is_classification=False)
    set_template(tokenizer, row_format.name, options)
    return Stream(
        source,
        SFTPreparer(tokenizer, row_format, options, keeps_prompts=False),
        options,
        seed=cfg.rng.seed,
        global_batch_size=cfg.step_scheduler.global_batch_size,
        num_epochs=cfg.step_scheduler.num_epochs,
        drop_last=cfg.dataloader.drop_last,
        pack_length=pack_length,
        told={field for rows in sample.values() for field in rows.counts.unused},
    )
