"""Write a Hugging Face directory from a training checkpoint of any layout, in one process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from automodel.config.schema import Recipe
from automodel.config.targets import check_target, foreign_code
from automodel.types import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from automodel.checkpoint.weight_reader import WeightReader
    from automodel.models.adapter_starts import PlainAdapterReader

Check = Callable[[Path], None]
"""Verifies a folder that was written; raises ExportError."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    checkpoint: Path
    out: Path
    dtype: str | None
    merge: bool
    max_shard_size: str
    verify: bool
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Run:
    """What the run that made a checkpoint says of its model.

    Attributes:
        model: the ``model`` section.
        peft: the ``peft`` section, or None.
        task: of the recipe, as the checkpoint noted it.
        tokenizer_dir: where the run keeps its tokenizer and chat template.
    """

    model: dict[str, Any]
    peft: dict[str, Any] | None
    task: Any
    tokenizer_dir: Path


def read_run(options: Options) -> Run:
    """Check the checkpoint to its last byte and return what its run says of the model.

    Raises:
        UserError: it is incomplete or damaged, lies in no run directory, or does not go with the options.
    """
    checkpoint, run_dir = options.checkpoint, options.checkpoint.parent.parent
    from automodel.checkpoint.manifest import damage
    from automodel.checkpoint.training import PROGRESS
    from automodel.checkpoint.unpickling import hidden_code

    problem = damage(checkpoint) or hidden_code(checkpoint)
    if problem:
        hint = ""
        inside = sorted((checkpoint / "checkpoints").glob("step_*"))
        if inside:
            hint = f"; this is a run directory, whose newest checkpoint is {inside[-1]}"
        raise UserError(f"{checkpoint}: {problem}{hint}")
    try:
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        model, peft, _ = config["model"], config.get("peft"), config["recipe"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        what = "there is none" if isinstance(error, FileNotFoundError) else f"it cannot be read ({error!r})"
        raise UserError(f"{run_dir / 'config.yaml'} says what model the checkpoint belongs to, but {what}") from error
    if options.merge and not peft:
        raise UserError(f"export.merge=true: the run in {run_dir} trained no adapters (peft=none); leave the key out")
    named = (("model", model), ("peft", peft), ("recipe", config["recipe"]))
    sections = [(name, section) for name, section in named if section]
    problems = [
        f"{line} runs code that is not automodel's own; if you trust who made this run, add "
        "export.trust_remote_code=true"
        for each in sections
        for line in foreign_code(*each)
        if not options.trust_remote_code
    ]
    problems = problems or [line for each in sections if each[0] != "recipe" for line in check_target(*each)]
    if problems:
        raise UserError(*(f"{run_dir / 'config.yaml'}: {line}" for line in problems))
    progress = json.loads((checkpoint / PROGRESS).read_text())
    if "attn_implementation" in model:
        model = model | {"attn_implementation": None}  # a kernel that only the machine of the run may have
    return Run(model, peft, _task_of(config, progress), run_dir / "tokenizer")


def _task_of(config: dict[str, Any], progress: dict[str, Any]) -> Any:
    """Return the task that the recipe of a run trained."""
    from automodel.runner.recipe import call_recipe

    section = dict(config["recipe"])
    if section["_target_"].startswith("automodel.recipes."):  # whose functions earlier versions called run
        section["_target_"] = section["_target_"].removesuffix(".run").removesuffix(".recipe") + ".recipe"
    return call_recipe(Recipe.model_validate(section)).task.restored(progress)


def export(options: Options, run: Run) -> None:
    """Write ``options.out``; it appears whole, and only once it is verified.

    Raises:
        UserError: the checkpoint's weights are not those of the model.
        ExportError: what was written does not load to the checkpoint's weights.
    """
    from automodel.checkpoint.weight_reader import WeightReader
    from automodel.hf_export.write import kept_if_unverified, publish, write_unverified
    from automodel.logs import get_logger
    from automodel.models.adapter_starts import PlainAdapterReader
    from automodel.models.adapters import LoRA
    from automodel.runner.build import build

    if options.dtype is None and run.peft is None and run.model.get("dtype") in ("float32", "bfloat16"):
        options = replace(options, dtype=run.model["dtype"])  # in which the run writes model/ as well
    source, adapters, reader = build(run.model), build(run.peft), WeightReader(options.checkpoint)
    if isinstance(adapters, LoRA) and adapters.starts_at_factors:
        adapters, reader = adapters.exported(), PlainAdapterReader(reader)
    trained = _Trained(source, adapters, _tokenizer(source, run), run.task, reader)
    write = _write_whole if trained.adapters is None else _write_merged if options.merge else _write_adapter

    def fill(folder: Path) -> Check:
        check = write(folder, trained, options=options)
        trained.tokenizer.save_pretrained(folder)
        if (settings := run.tokenizer_dir / "generation_config.json").is_file():
            shutil.copy(settings, folder)
        return check

    unverified, check = write_unverified(options.out, fill)
    if options.verify:
        with kept_if_unverified(unverified):
            check(unverified)
    publish(unverified, options.out)
    how = "and verified" if options.verify else "but not verified (export.verify=false)"
    get_logger("automodel.export").info("%s is written %s", options.out, how)


def _tokenizer(source: Any, run: Run) -> PreTrainedTokenizerBase:
    """Return the tokenizer with the chat template that was trained with; of older runs, the model's own."""
    from transformers import AutoTokenizer

    if not run.tokenizer_dir.is_dir():
        return source.load_tokenizer()
    return AutoTokenizer.from_pretrained(
        run.tokenizer_dir, trust_remote_code=bool(run.model.get("trust_remote_code", False))
    )


@dataclass(frozen=True)
class _Trained:
    """What was trained, and where its weights lie."""

    source: Any
    adapters: Any
    tokenizer: PreTrainedTokenizerBase
    task: Any
    reader: WeightReader | PlainAdapterReader

    def unfilled(self, device: str) -> PreTrainedModel:
        from automodel.models.hf import build_unfilled

        return build_unfilled(self.source, self.tokenizer, task=self.task, device=device)

    def load_base(self) -> PreTrainedModel:
        return self.source.build(self.tokenizer, task=self.task)

    def adapted(self, base: PreTrainedModel) -> nn.Module:
        from automodel.models.embeddings import new_token_ids

        return self.adapters.apply(base, task=self.task, new_token_ids=new_token_ids(self.source, self.tokenizer))

    def require_fit(self, shapes: dict[str, tuple[int, ...]], options: Options, *, ignored: set[str]) -> None:
        from automodel.checkpoint.weight_reader import mismatches

        problems = mismatches(self.reader, shapes, ignored=ignored)
        if problems:
            raise UserError(*(f"{options.checkpoint} does not fit the model of its run: {line}" for line in problems))

    def dtype_of(self, name: str, options: Options) -> torch.dtype:
        """Return the type in which a weight is written."""
        import torch

        saved = self.reader.dtypes[name]
        return getattr(torch, options.dtype) if options.dtype and saved.is_floating_point else saved


def _write_whole(folder: Path, trained: _Trained, *, options: Options) -> Check:
    import torch

    from automodel.hf_export.verification import digests_of, probe, verify
    from automodel.hf_export.weight_files import write_weight_files

    model = trained.unfilled("meta")
    aliases = set(model.all_tied_weights_keys)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}
    trained.require_fit({name: tuple(tensor.shape) for name, tensor in state.items()}, options, ignored=aliases)
    dtypes = {name: trained.dtype_of(name, options) for name in state}
    model.to(next(dtype for dtype in dtypes.values() if dtype.is_floating_point))  # the config says so

    def read(name: str) -> torch.Tensor:
        return trained.reader.read(name).to(dtypes[name])

    model.save_pretrained(folder, state_dict={})  # configuration, generation settings and custom code
    described = {name: torch.empty(tensor.shape, dtype=dtypes[name], device="meta") for name, tensor in state.items()}
    write_weight_files(model, described, read=read, folder=folder, max_size=options.max_shard_size)

    def check(written: Path) -> None:
        live = trained.unfilled("cpu")
        places = live.state_dict(keep_vars=True)
        for name in state:
            places[name].data = read(name)
        expected, digests = probe(live), digests_of(live.state_dict())
        del live, places
        verify(written, model, expected=expected, digests=digests)

    return check


def _write_adapter(folder: Path, trained: _Trained, *, options: Options) -> Check:
    from automodel.hf_export.verification import digests_of, probe, verify

    model = trained.adapted(trained.unfilled("meta"))
    weights = _adapter_weights(model, trained, options=options)
    model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)

    def check(written: Path) -> None:
        live = trained.adapted(trained.load_base())
        _put(weights, live)
        expected = probe(live)
        del live
        digests = digests_of(weights)
        verify(written, model, expected=expected, digests=digests, load_base=trained.load_base)

    return check


def _write_merged(folder: Path, trained: _Trained, *, options: Options) -> Check:
    import torch

    from automodel.hf_export.verification import digests_of, probe, verify

    model = trained.adapted(trained.load_base())
    _put(_adapter_weights(model, trained, options=replace(options, dtype=None)), model)
    expected = probe(model) if options.verify else None
    base_dtype = model.get_base_model().dtype
    dtype = getattr(torch, options.dtype) if options.dtype else base_dtype
    model.to(torch.promote_types(base_dtype, dtype))  # so that it is rounded once
    merged = model.merge_and_unload().to(dtype)
    merged.save_pretrained(folder, max_shard_size=options.max_shard_size)
    digests = digests_of(merged.state_dict()) if options.verify else {}
    merged.to("meta")
    return lambda written: verify(written, merged, expected=expected, digests=digests)


def _adapter_weights(model: nn.Module, trained: _Trained, *, options: Options) -> dict[str, torch.Tensor]:
    shapes = {name: tuple(each.shape) for name, each in model.named_parameters() if each.requires_grad}
    trained.require_fit(shapes, options, ignored=set())
    return {name: trained.reader.read(name).to(trained.dtype_of(name, options)) for name in shapes}


def _put(weights: dict[str, torch.Tensor], model: nn.Module) -> None:
    for name, weight in weights.items():
        model.get_parameter(name).data.copy_(weight)
