"""The sequence classifier: a text has one label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel.data.formats.samples import TextLabel
from automodel.data.prepare.labels import numbered_labels
from automodel.data.prepare.options import PrepareOptions
from automodel.data.prepare.prepare_row import Prepared, prepare_input
from automodel.data.rows import BadRow
from automodel.tasks.task import Task
from automodel.types import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from automodel.data.batches.loader import Collate
    from automodel.data.prepare.prepared import PreparedRows
    from automodel.eval.metrics import Metrics

_NUM_LISTED = 12


@dataclass(frozen=True)
class SequenceClassification(Task):
    """A sequence classifier of transformers, whose labels come from the rows.

    Attributes:
        label_names: the labels by their index, as the model calls them; empty until the task is fitted.
        spelt: the same as the rows spell them.
    """

    label_names: tuple[str, ...] = ()
    spelt: tuple[str, ...] = ()

    peft_type = "SEQ_CLS"
    has_new_head = True
    samples = (TextLabel,)

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def configure(self, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        from automodel.models.hf import pad_token_id

        config.id2label = dict(enumerate(self.label_names))
        config.label2id = {name: index for index, name in enumerate(self.label_names)}
        config.problem_type = "single_label_classification"
        config.pad_token_id = pad_token_id(tokenizer)

    def loading_code(self, folder: Path, *, is_adapter: bool) -> str:
        code = super().loading_code(folder, is_adapter=is_adapter)
        return f"{code[:-1]}, num_labels={len(self.label_names)})" if is_adapter else code

    def facts(self) -> dict[str, Any]:
        return {"labels": list(self.label_names)}

    def restored(self, facts: Mapping[str, Any]) -> Task:
        return replace(self, label_names=tuple(facts["labels"]))

    def columns(self, *, keeps_prompts: bool) -> dict[str, str]:
        return {"input_ids": "ids", "label": "text"}

    def prepare(
        self, sample: Any, tokenizer: PreTrainedTokenizerBase, options: PrepareOptions, *, keeps_prompts: bool
    ) -> Prepared:
        if self.spelt and sample.label not in self.spelt:
            listed = ", ".join(self.spelt[:_NUM_LISTED]) + (", ..." if len(self.spelt) > _NUM_LISTED else "")
            raise BadRow(
                f"label {sample.label!r} does not occur in the training set; its labels: {listed} "
                "(on_bad_row=skip leaves such rows out)"
            )
        return prepare_input(sample.text, tokenizer, options, label=sample.label)

    def identity(self) -> Any:
        return self.spelt

    def fitted(self, rows: Sequence[PreparedRows], *, head_labels: Sequence[str]) -> Task:
        labels = {label for each in rows for label in each.table.unique("label")}
        name = rows[0].name
        if len(labels) < 2:
            raise UserError(f"{name}: every row has the label {labels.pop()!r}; a classifier needs two labels or more")
        label_names, spelt = numbered_labels(name, labels, head_labels)
        return replace(self, label_names=label_names, spelt=spelt)

    def examples(self, rows: PreparedRows) -> Any:
        import numpy as np

        index = {label: i for i, label in enumerate(self.spelt)}
        labels = np.fromiter((index[each] for each in rows.table["label"]), dtype=np.int32, count=len(rows.table))
        return rows.table.select_columns(["input_ids"]).add_column("labels", labels)

    def shown_target(self, example: Mapping[str, Any]) -> str:
        return self.label_names[example["labels"]]

    def label_counts(self, rows: PreparedRows) -> dict[str, int]:
        import numpy as np

        counts = np.bincount(np.array(rows.examples["labels"]), minlength=len(self.label_names))
        return dict(zip(self.label_names, counts.tolist(), strict=True))

    def collator(self, tokenizer: PreTrainedTokenizerBase, length_multiple: int) -> Collate:
        from automodel.data.batches.collate import RowTargetCollator
        from automodel.models.hf import pad_token_id

        return RowTargetCollator(pad_token_id(tokenizer), length_multiple)

    def metrics(self) -> Metrics | None:
        from automodel.eval.metrics import ConfusionMatrix

        return ConfusionMatrix(len(self.label_names))
