"""The typed configuration: what every key must be. Defaults are only in ``conf/``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt

Target = dict[str, Any]
"""A section with ``_target_``, checked against the signature of what it names."""


def _empty_is_none(value: Any) -> Any:
    return None if value == {} else value


def _number_is_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_number_is_text)]
OptionalTarget = Annotated[Target | None, BeforeValidator(_empty_is_none)]
Cadence = PositiveInt | Literal["auto"] | None
PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A section whose keys are all known."""

    model_config = ConfigDict(extra="forbid", strict=True, populate_by_name=True, frozen=True)


class Recipe(Section):
    """Further keys are the arguments of what ``_target_`` names."""

    model_config = ConfigDict(extra="allow", strict=True, populate_by_name=True, frozen=True)

    target: str = Field(alias="_target_")
    name: str
    evaluations: list[str] = ["loss"]
    packs: bool = False

    @property
    def own_keys(self) -> dict[str, Any]:
        """The keys that this recipe alone has."""
        return dict(self.model_extra or {})


class DistEnv(Section):
    backend: Text
    timeout_minutes: PositiveNumber
    init_timeout_minutes: PositiveNumber


class Rng(Section):
    seed: Annotated[int, Field(ge=0)]
    deterministic: bool


class StepSchedulerSection(Section):
    global_batch_size: PositiveInt
    local_batch_size: PositiveInt
    num_epochs: PositiveInt
    max_steps: PositiveInt | None
    val_every_steps: Cadence
    ckpt_every_steps: Cadence
    log_every_steps: PositiveInt


class DataLoaderSection(Section):
    num_workers: Annotated[int, Field(ge=0)]
    drop_last: bool
    sort_within_step: bool
    length_grouped: bool
    max_tokens_per_batch: PositiveInt | None


class Packing(Section):
    enabled: bool
    max_length: PositiveInt | None


class ClipGradNorm(Section):
    max_norm: PositiveNumber | None


class CheckpointSection(Section):
    enabled: bool
    resume: Text
    allow_changes: bool
    keep_last: PositiveInt | None
    keep_every: PositiveInt | None
    keep_best: Text | None
    async_save: bool
    on_error: Literal["stop", "continue"]


class Export(Section):
    enabled: bool
    verify: bool


class Config(Section):
    """The whole configuration; sections with a ``_target_`` stay plain dicts."""

    recipe: Recipe
    output_dir: Text | None
    dist_env: DistEnv
    rng: Rng
    step_scheduler: StepSchedulerSection
    dataloader: DataLoaderSection
    packing: Packing
    data_checks: Literal["auto", "strict", "warn"]
    clip_grad_norm: ClipGradNorm
    on_non_finite: Literal["stop", "skip"]
    checkpoint: CheckpointSection
    export: Export
    model: Target
    peft: OptionalTarget = None
    dataset: Target
    validation_dataset: OptionalTarget = None
    distributed: Target
    optimizer: Target
    lr_scheduler: Target
    loss_fn: Target
    evaluation: OptionalTarget = None
    logger: dict[str, Target]
    launch: Target

    @property
    def is_validated(self) -> bool:
        """Whether there are rows to validate on."""
        return self.validation_dataset is not None or self.dataset.get("validation_share") is not None
