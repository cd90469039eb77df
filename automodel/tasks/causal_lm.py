"""The causal language model: text continues text, and the supervised part of it is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from automodel.data.chat.encode import added_ids, require_eos
from automodel.data.chat.stops import Stops
from automodel.data.formats.samples import Messages, PlainText, PromptCompletion
from automodel.data.prepare.options import PrepareOptions
from automodel.data.prepare.prepare_row import Prepared, row_hash
from automodel.data.prepare.tokenize import Tokens, cut, shifted_example, tokenize_sample
from automodel.tasks.task import Task
from automodel.types import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from automodel.data.batches.loader import Collate
    from automodel.data.prepare.prepared import PreparedRows


@dataclass(frozen=True)
class CausalLM(Task):
    """A causal language model of transformers."""

    peft_type = "CAUSAL_LM"
    samples = (Messages, PromptCompletion, PlainText)
    can_stream = True
    is_generative = True

    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def configure(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Leave ``config`` as it is."""

    def require_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        require_eos(tokenizer)

    def columns(self, *, keeps_prompts: bool) -> dict[str, str]:
        columns = {"input_ids": "ids", "labels": "ids", "loss_weights": "weights"}
        prompt = {"prompt_ids": "ids", "answer": "text", "question": "text", "kind": "text"}
        return columns | prompt if keeps_prompts else columns

    def prepare(
        self, sample: Any, tokenizer: PreTrainedTokenizerBase, options: PrepareOptions, *, keeps_prompts: bool
    ) -> Prepared:
        tokens = tokenize_sample(tokenizer, sample, supervise=options.supervise)
        short = cut(tokens, max_length=options.max_length, truncation=options.truncation, limit=options.length_limit)
        if short is None:
            return Prepared(None, is_too_long=True)
        example = shifted_example(short)
        if example is None:
            return Prepared(None)
        record = {
            "loss_weights": [],
            **example,
            "num_supervised": sum(label != IGNORE_INDEX for label in example["labels"]),
            "has_end": short.end is not None,
            "hash": row_hash(example["input_ids"], example["labels"]),
        }
        if keeps_prompts:
            record |= _prompt(tokenizer, sample, tokens, max_length=options.max_length)
        stops = Stops(
            frozenset(short.ids[end] for end in short.ends) & added_ids(tokenizer), frozenset(short.end_texts)
        )
        return Prepared(record, is_truncated=len(short.ids) < len(tokens.ids), notes=tokens.notes, stops=stops)

    def examples(self, rows: PreparedRows) -> Any:
        names = ["input_ids", "labels"] + (["loss_weights"] if rows.has_weights else [])
        return rows.table.select_columns(names)

    def collator(self, tokenizer: PreTrainedTokenizerBase, length_multiple: int) -> Collate:
        from automodel.data.batches.collate import CausalLMCollator
        from automodel.models.hf import pad_token_id

        return CausalLMCollator(pad_token_id(tokenizer), length_multiple)


def _prompt(
    tokenizer: PreTrainedTokenizerBase, sample: Any, tokens: Tokens, *, max_length: int
) -> dict[str, str | list[int] | None]:
    """Return what is asked, and as the answer the text of the tokens that training would have the model write."""
    ids = tokens.ids[: tokens.num_prompt][-max_length:]  # the end of a prompt asks the question
    written = max((i for i, weight in enumerate(tokens.weights) if weight), default=-1) + 1
    answer = tokenizer.decode(tokens.ids[tokens.num_prompt : written], skip_special_tokens=True)
    answer = Stops(texts=frozenset(tokens.end_texts)).cut(answer)
    prompt = {"prompt_ids": ids, "answer": answer, "question": "", "kind": None}
    if isinstance(sample, PromptCompletion):
        return prompt | {"question": sample.prompt, "kind": sample.kind}
    if isinstance(sample, Messages):
        weights = sample.weights or [None] * len(sample.turns)
        answers = (i for i, turn in enumerate(sample.turns) if turn["role"] == "assistant" and weights[i] != 0)
        last = max(answers, default=len(sample.turns) - 1)
        return prompt | {"question": sample.turns[last - 1]["content"] if last else ""}
    return prompt
