"""Generate greedy answers to the validation prompts, split over the ranks, and score them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import NonNegativeInt, PositiveInt

from automodel.data.chat.stops import NO_STOPS, Stops
from automodel.distributed.parallel.handle import handle_of
from automodel.eval.scorers import EXACT_MATCH, exact_match

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from automodel.config import Config
    from automodel.data.prepare.prepared import Prompt
    from automodel.distributed.runtime.agreement import StopPoll


@dataclass(frozen=True)
class GenerationScores:
    """The scores of generated answers; the same on every rank.

    Attributes:
        means: the mean of each scorer over all rows, by the scorer's name; ``exact_match`` first.
        by_kind: exact match for each kind of row, where the rows have one.
        samples: (question, right answer, the model's answer) of the first rows of every kind in turn.
    """

    means: dict[str, float]
    by_kind: dict[str, float]
    samples: list[tuple[str, str, str]]

    def metrics(self) -> dict[str, float]:
        """Return the scores as the entries of a validation record."""
        means = {f"metric/{name}": value for name, value in self.means.items()}
        return means | {f"metric/{EXACT_MATCH}/{kind}": value for kind, value in self.by_kind.items()}


@dataclass(frozen=True)
class GenerationEvaluation:
    """What ``evaluation=generation`` configures.

    Attributes:
        scorers: further scores by name, each a function (prompt, answer) -> number; the mean is logged as
            ``metric/NAME``.
    """

    batch_size: PositiveInt = 64
    max_new_tokens: PositiveInt = 64
    num_rows: PositiveInt | None = None
    num_samples: NonNegativeInt = 5
    scorers: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def problems(section: dict[str, Any], cfg: Config, *, key: str, world_size: int) -> Iterator[str]:
        """Yield what does not fit together; see ``config/targets.py``."""
        if not cfg.is_validated:
            yield "evaluation=generation needs rows to answer: a validation_dataset, or dataset.validation_share"

    def run(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompts: Sequence[Prompt],
        device: torch.device,
        dp_group: dist.ProcessGroup,
        stops: Stops = NO_STOPS,
        poll: StopPoll | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> GenerationScores:
        """Generate and score; every rank must call it with the same prompts.

        An error on one rank is raised on every rank or, if the ranks generate in lockstep, ends the run. CutShort is
        raised on every rank if ``poll`` says that one was asked to stop.

        Args:
            model: as trained, perhaps wrapped.
            device: the device of the model.
            dp_group: the ranks that split the prompts.
            stops: the ends of answers that training supervises; stop tokens are also in the generation settings.
            autocast: makes the autocast context of the model.
        """
        import torch.distributed as dist

        from automodel.distributed.runtime.agreement import CutShort, run_on_all_ranks

        rank, size = dist.get_rank(dp_group), dist.get_world_size(dp_group)
        handle = handle_of(model)
        is_alone = size > 1 and not handle.generates_in_lockstep
        prompts = prompts[: self.num_rows]

        def answer() -> list[tuple[int, str]] | None:
            options = {"share": (rank, size), "is_alone": is_alone, "device": device}
            with autocast(), handle.generating() as generator:
                return self._answer(generator, tokenizer, prompts, poll=poll, **options)

        answers = run_on_all_ranks(answer) if is_alone else answer()
        gathered: list[Any] = [None] * size
        dist.all_gather_object(gathered, answers, group=dp_group)
        if None in gathered:
            raise CutShort
        return self._score(prompts, {index: stops.cut(text) for part in gathered for index, text in part})

    def _answer(
        self,
        generator: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Prompt],
        *,
        share: tuple[int, int],
        is_alone: bool,
        device: torch.device,
        poll: StopPoll | None,
    ) -> list[tuple[int, str]] | None:
        """Return (index, answer) for this rank's share of the prompts; None if this rank alone was interrupted."""
        from automodel.screen import progress

        rank, size = share
        in_lockstep = not is_alone and size > 1
        was_training = generator.training
        generator.eval()
        answers: list[tuple[int, str]] = []
        try:
            with progress(len(prompts), description="generating answers") as bar:
                for start in range(0, len(prompts), self.batch_size * size):
                    if poll is not None and is_alone and poll.is_heard():
                        return None
                    if poll is not None and not is_alone:
                        poll.raise_if_agreed()
                    first = start + rank * self.batch_size
                    chosen = range(first, min(first + self.batch_size, len(prompts)))
                    if not chosen and is_alone:
                        continue
                    # In lockstep, a rank without rows in this round generates too; its answer is not scored.
                    ids = [prompts[i].prompt_ids for i in chosen or range(1)]
                    texts = self._generate(generator, tokenizer, ids, device=device, in_lockstep=in_lockstep)
                    answers += zip(chosen, texts, strict=False)
                    bar.update(min(start + self.batch_size * size, len(prompts)))
        finally:
            generator.train(was_training)
        return answers

    def _generate(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: list[list[int]],
        *,
        device: torch.device,
        in_lockstep: bool,
    ) -> list[str]:
        import torch
        from transformers import GenerationConfig

        width = max(len(ids) for ids in prompt_ids)
        # Padded on the left, so that every answer starts in the same column.
        padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompt_ids], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
        own = model.generation_config
        eos = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
        config = GenerationConfig(
            do_sample=False, max_new_tokens=self.max_new_tokens, eos_token_id=eos, bos_token_id=own.bos_token_id,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )  # fmt: skip
        with torch.no_grad():
            out = model.generate(
                input_ids=padded, attention_mask=mask, generation_config=config, synced_gpus=in_lockstep
            )
        return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)

    def _score(self, prompts: Sequence[Prompt], answers: dict[int, str]) -> GenerationScores:
        scorers = {EXACT_MATCH: exact_match, **self.scorers}
        scores = {
            name: [float(score(prompt, answers[i])) for i, prompt in enumerate(prompts)]
            for name, score in scorers.items()
        }
        rows_by_kind: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            rows_by_kind.setdefault(prompt.kind or "", []).append(i)
        by_kind = {
            kind: sum(scores[EXACT_MATCH][i] for i in rows) / len(rows)
            for kind, rows in sorted(rows_by_kind.items())
            if kind
        }
        in_turn = sorted((rows.index(i), i) for rows in rows_by_kind.values() for i in rows[: self.num_samples])
        samples = [(prompts[i].question, prompts[i].answer, answers[i]) for _, i in in_turn[: self.num_samples]]
        means = {name: sum(values) / max(1, len(values)) for name, values in scores.items()}
        return GenerationScores(means, by_kind, samples)
