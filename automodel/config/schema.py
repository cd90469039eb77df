"""The typed configuration: what every key must be. Defaults stand in ``conf/`` alone."""

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
PositiveNumber = Annotated[float, Field(gt=0)]


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
    backend: Text = Field(description="by device (cuda nccl, cpu gloo, ...), or one by name")
    timeout_minutes: PositiveNumber = Field(description="how long collectives may take while training")
    init_timeout_minutes: PositiveNumber = Field(description="the same while starting, evaluating and saving")


class Rng(Section):
    seed: Annotated[int, Field(ge=0)] = Field(description="of the order of rows, fresh weights and dropout")
    deterministic: bool = Field(description="bit for bit on CUDA as well, at its price")


class StepSchedulerSection(Section):
    global_batch_size: PositiveInt = Field(description="rows an optimizer step, over all ranks; with peft 16")
    local_batch_size: PositiveInt = Field(description="rows a micro-batch, on each rank")
    num_epochs: PositiveInt = Field(description="epochs or max_steps: whichever ends first")
    max_steps: PositiveInt | None = Field(description="optimizer steps at most")
    val_every_steps: Cadence = Field(description="auto: before, a few times on the way, at the end; null: at the end")
    ckpt_every_steps: Cadence = Field(description="auto: so that a kill loses minutes; null: at the end")
    log_every_steps: PositiveInt = Field(description="steps between logged lines")


class DataLoaderSection(Section):
    num_workers: Annotated[int, Field(ge=0)] = Field(description="processes that read ahead")
    drop_last: bool = Field(description="drop the short last global batch instead of training it")
    length_grouped: bool = Field(description="put rows of about one length into a step, so that little is padded")
    max_tokens_per_batch: PositiveInt | None = Field(description="a micro-batch takes so many tokens, not so many rows")


class Packing(Section):
    enabled: bool = Field(description="put several documents into one row, kept apart")
    max_length: PositiveInt | None = Field(description="tokens of a packed row; null: dataset.max_length")


class ClipGradNorm(Section):
    max_norm: PositiveNumber | None = Field(description="null: off; the norm is logged all the same")


class CheckpointSection(Section):
    enabled: bool = Field(description="write training checkpoints")
    resume: Text = Field(description="auto, never, or the path of a checkpoint to begin at")
    allow_changes: bool = Field(description="continue although seed, batch, rows or model have changed")
    keep_last: PositiveInt | None = Field(description="how many of the newest are kept; null: all")
    keep_every: PositiveInt | None = Field(description="those of every so many steps are kept as well")
    keep_best: Text | None = Field(description="the best as well: min:loss or max:metric/NAME")
    async_save: bool = Field(description="write in the background, from a copy in host memory")
    on_error: Literal["stop", "continue"] = Field(description="after a write that failed; the last must succeed")


class Export(Section):
    enabled: bool = Field(description="write the final model as a Hugging Face directory")
    verify: bool = Field(description="load it again and compare its logits before it counts as written")


class Config(Section):
    """The whole configuration; sections with a ``_target_`` stay plain dicts."""

    recipe: Recipe
    output_dir: Text | None = Field(description="default: outputs/<recipe>/<run id>")
    dist_env: DistEnv
    rng: Rng
    step_scheduler: StepSchedulerSection
    dataloader: DataLoaderSection
    packing: Packing
    data_checks: Literal["auto", "strict", "warn"] = Field(description="stop at what is surely wrong, at all, or never")
    clip_grad_norm: ClipGradNorm
    on_non_finite: Literal["stop", "skip"] = Field(description="stop, or skip and go on; never a weight changed")
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
