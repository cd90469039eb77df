"""A task: a kind of model and head, and what a row becomes for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from automodel.data.batches.loader import Collate
    from automodel.data.prepare.options import PrepareOptions
    from automodel.data.prepare.prepare_row import Prepared
    from automodel.data.prepare.prepared import PreparedRows
    from automodel.eval.metrics import Metrics


class Task(Protocol):
    """What differs between language models, classifiers and tasks of your own; nothing else asks which it is.

    A class of your own may inherit from it: the methods with a body are what most tasks want. An instance travels to
    the processes that prepare rows, so it must be picklable.

    Attributes:
        peft_type: PEFT's name of the task, such as ``CAUSAL_LM``.
        has_new_head: a checkpoint may lack the weights of the head, or bring a head that is not used.
        samples: the types of sample that it prepares; it takes the rows of every format that reads one of them.
        can_stream: rows can be prepared before all of them are known.
        is_generative: the model writes text, of which part is supervised, and can be asked for answers.
    """

    peft_type: str
    has_new_head: bool = False
    samples: tuple[type, ...] = ()
    can_stream: bool = False
    is_generative: bool = False

    # The model

    def auto_class(self) -> Any:
        """Return the class of transformers whose ``from_pretrained`` loads the model."""

    def configure(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set what the task decides in the model's configuration, such as its labels."""

    def loading_code(self, folder: Path, *, is_adapter: bool) -> str:
        """Return the line of Python that loads the exported model."""
        library, prefix = ("peft", "AutoPeft") if is_adapter else ("transformers", "Auto")
        auto_class = self.auto_class().__name__.replace("Auto", prefix, 1)
        return f"from {library} import {auto_class}; model = {auto_class}.from_pretrained({str(folder)!r})"

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint must note, as JSON, so that an export can rebuild the task."""
        return {}

    def restored(self, facts: Mapping[str, Any]) -> Task:
        """Return the task as it was when a checkpoint noted ``facts``."""
        return self

    # The rows

    def require_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise UserError if the tokenizer lacks what the task needs."""

    def columns(self, *, keeps_prompts: bool) -> dict[str, str]:
        """Return the columns of a prepared row: ``ids``, ``weights``, ``text``, ``int`` or ``float`` by name."""

    def prepare(
        self, sample: Any, tokenizer: PreTrainedTokenizerBase, options: PrepareOptions, *, keeps_prompts: bool
    ) -> Prepared:
        """Tokenise what a format read from a row; raises BadRow for a row that cannot be used.

        Args:
            keeps_prompts: keep what is needed to generate an answer and score it.
        """

    def identity(self) -> Any:
        """Return, for JSON, what decides the prepared rows besides the code; part of the key of their cache."""
        return None

    def fitted(self, rows: Sequence[PreparedRows], *, head_labels: Sequence[str]) -> Task:
        """Return the task with what it learns from all training rows, such as the labels.

        Args:
            head_labels: those of the pretrained model's own head; empty where it has none.
        """
        return self

    def examples(self, rows: PreparedRows) -> Any:
        """Return the map-style examples that the collator takes."""
        return rows.table.select_columns(list(self.columns(keeps_prompts=False)))

    def shown_target(self, example: Mapping[str, Any]) -> str:
        """Return what an example of a task that is not generative should give, as the preview shows it."""
        return str(example.get("labels", ""))

    def label_counts(self, rows: PreparedRows) -> dict[str, int]:
        """Return how many rows have each label; empty for a task without a set of labels."""
        return {}

    # Training and validation

    def collator(self, tokenizer: PreTrainedTokenizerBase, length_multiple: int) -> Collate:
        """Return what makes a batch of examples; without any example, a dummy that supervises nothing.

        Args:
            length_multiple: what the length of a batch must be a multiple of.
        """

    def metrics(self) -> Metrics | None:
        """Return what validation measures beside the objective."""
        return None
