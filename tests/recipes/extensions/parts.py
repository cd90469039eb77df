"""A loss, a logger, a row format and a scorer of one's own."""

import json
from dataclasses import dataclass

from torch.nn import functional as F

from automodel.data.formats.row_format import RowFormat
from automodel.data.formats.samples import PromptCompletion
from automodel.losses.cross_entropy import forward_logits


@dataclass(frozen=True)
class SmoothedLoss:
    """Cross entropy with smoothed labels, for language models and classifiers."""

    smoothing: float = 0.1

    def __call__(self, model, batch):
        logits = forward_logits(model, batch).flatten(0, -2).float()
        labels = batch.labels.flatten()
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing, ignore_index=-100, reduction="sum")


class TextLogger:
    """A line of text for every record, in ``log.txt`` of the run folder."""

    def open(self, run_dir, *, run_id, config):
        self.file = (run_dir.path / "log.txt").open("a")
        return self

    def log(self, record):
        print(json.dumps(record), file=self.file, flush=True)

    def close(self):
        self.file.close()


class QuizFormat(RowFormat):
    """Rows of ``{"q": ..., "a": ...}``."""

    sample = PromptCompletion
    required = ("q", "a")

    def read(self, columns, row):
        return PromptCompletion(columns.text(row, "q") + "\n", columns.text(row, "a"))


class SameLength:
    """Scores an answer by whether it is as long as the right one."""

    def __call__(self, prompt, answer):
        return len(answer.strip()) == len(prompt.answer.strip())
