"""A recipe: what is trained, as a description that the runner carries out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from automodel.config.schema import Recipe as Section
from automodel.config.targets import resolve

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from automodel.config import Config
    from automodel.losses.objective import Objective
    from automodel.tasks.task import Task


@dataclass(frozen=True)
class Parts:
    """What a recipe can make its objective of.

    Attributes:
        task: as the rows have completed it: a classifier knows its labels.
        model: the trained model, wrapped or sharded.
        frozen: the recipe's frozen models by name, in evaluation mode and without gradients.
        loss_fn: what the section ``loss_fn`` configures: (model, batch) -> loss sum.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase
    model: nn.Module
    frozen: Mapping[str, nn.Module]
    loss_fn: Callable[..., Any]


def configured_loss(parts: Parts) -> Callable[..., Any]:
    """Return what ``loss_fn`` configures: the objective of a recipe that does not name its own."""
    return parts.loss_fn


@dataclass(frozen=True)
class Recipe:
    """What ``recipe._target_`` returns, a function of the further keys of the ``recipe`` section.

    Nothing is loaded by it: the same description serves training, ``--dry-build``, the preview and the export.

    Attributes:
        task: the kind of model and head, and what a row becomes for it.
        objective: makes what is minimised and validated: (model, batch) -> Sums, or a loss sum as a scalar.
        frozen_models: models that the objective runs without training them, by name: a section like ``model``; None for
            the section ``model`` itself, so the weights as they were before training.
    """

    task: Task
    objective: Callable[[Parts], Objective | Callable[..., Any]] = configured_loss
    frozen_models: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)


def build_recipe(cfg: Config) -> Recipe:
    """Call what ``recipe._target_`` names with the recipe's own keys."""
    return call_recipe(cfg.recipe)


def call_recipe(section: Section) -> Recipe:
    """Return the recipe that a ``recipe`` section describes."""
    return resolve(section.target)(**section.own_keys)
