"""Fill a sharded model from its weight files, each rank its own shards alone.

The ranks of a node together hold the model once and read its files once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.modules.module import register_module_parameter_registration_hook

from automodel.distributed.runtime.agreement import on_every_rank, picklable_error
from automodel.logs import get_logger
from automodel.models.adapters import LoRA
from automodel.models.embeddings import new_token_ids
from automodel.models.hf import HFModel, build_unfilled, require_complete
from automodel.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = get_logger(__name__)

_OF_ADAPTERS = re.compile(r"^base_model\.model\.|\.(base_layer|original_module|modules_to_save\.\w+)(?=\.)")
"""What PEFT puts into the names of a model's own weights."""


class _MustLoadWhole(Exception):
    """Why the shards cannot be filled to exactly what ``from_pretrained`` loads."""


@dataclass(frozen=True)
class _StoredWeight:
    """Where a weight is stored."""

    file: Path
    key: str


@dataclass(frozen=True)
class UnfilledModel:
    """A pretrained model whose weights, on the meta device, take no memory, and where they are stored.

    Attributes:
        places: by the name of each weight, and of each buffer that the files hold.
    """

    model: PreTrainedModel
    places: dict[str, _StoredWeight]

    def adapted(self, adapters: LoRA | None, *, task: Any) -> nn.Module:
        """Return the model with adapters, which are drawn as for a model that is loaded; its own weights stay meta."""
        if adapters is None:
            return self.model
        for parameter in list(self.model.parameters()):
            # PEFT draws on the device of the weight it adapts. One element is expanded to all, so this takes no memory.
            _become(parameter, torch.empty((), dtype=parameter.dtype).expand(parameter.shape))
        adapted = adapters.apply(self.model, task=task)
        for name, parameter in list(adapted.named_parameters()):
            if _own_name(name) in self.places:
                _become(parameter, parameter.detach().to("meta"))
        return adapted

    def fill(self, sharded: nn.Module, device: torch.device) -> None:
        """Allocate this rank's shards of every weight on ``device`` and read them, and nothing else, from the files.

        Args:
            sharded: what ``parallelize`` made of ``adapted``.
        """
        unread: dict[Path, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in [*sharded.named_parameters(), *sharded.named_buffers()]:
            place = self.places.get(_own_name(name))
            if place is not None:
                unread.setdefault(place.file, []).append((place.key, tensor))
        for path, tensors in unread.items():
            with safe_open(path, framework="pt") as file:
                for key, tensor in tensors:
                    _fill(tensor, file.get_slice(key), device)
        unfilled = [name for name, parameter in sharded.named_parameters() if parameter.is_meta]
        assert not unfilled, f"no file was read for {unfilled}"


def unfilled_model(
    source: Any, tokenizer: PreTrainedTokenizerBase, *, task: Any, adapters: Any
) -> UnfilledModel | None:
    """Build the model of ``source`` without weights, to be filled once it is sharded; every rank must call it.

    Returns None on all ranks if that cannot give exactly the model that loading it whole gives (the log says why), and
    for a source without pretrained weights.

    Args:
        source: what the ``model`` section builds, on every rank the same.
        task: the Task of the model.
        adapters: what the ``peft`` section builds.

    Raises:
        UserError: on every rank, where a weight is missing, unknown, or of another shape.
    """
    if not isinstance(source, HFModel):
        return None
    unfilled, reason, failure = None, None, None
    try:
        unfilled = _prepare(source, tokenizer, task=task, adapters=adapters)
    except UserError as error:
        failure = error
    except _MustLoadWhole as error:
        reason = str(error)
    except Exception as error:  # loading the whole may know how, or says in its own words what is wrong
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    reasons, failures = zip(*on_every_rank((reason, picklable_error(failure))), strict=True)
    for failure in filter(None, failures):
        raise failure
    for reason in filter(None, reasons):
        log.info("every rank loads the whole model, not its shards alone: %s", reason)
        return None
    return unfilled


def _prepare(source: HFModel, tokenizer: PreTrainedTokenizerBase, *, task: Any, adapters: Any) -> UnfilledModel:
    for each, known in ((source, (HFModel,)), (adapters, (LoRA, type(None)))):
        if type(each) not in known:
            raise _MustLoadWhole(f"what {type(each).__name__} does with the weights is not known")
    if adapters is not None and (reason := adapters.needs_whole_weights):
        raise _MustLoadWhole(reason)
    if new_token_ids(source, tokenizer):
        raise _MustLoadWhole("its embeddings get new rows")
    files = _weight_files(source)
    with torch.random.fork_rng(devices=[]), _parameters_on_meta():
        model = build_unfilled(source, tokenizer, task=task, device="cpu").eval()
    _require_plain(model)
    shapes = _shapes_in(files)
    places = _places_by_name(model, shapes)
    _require_same(source, model, shapes, places, has_new_head=task.has_new_head)
    tied = model.all_tied_weights_keys
    of_tied: dict[str, _StoredWeight] = {}
    for name in model.state_dict().keys() & places.keys():
        if of_tied.setdefault(tied.get(name, name), places[name]) is not places[name]:
            raise _MustLoadWhole(f"the files hold a tied weight twice, one of them as {name}")
    return UnfilledModel(model, {name: of_tied[tied.get(name, name)] for name in model.state_dict()})


def _weight_files(source: HFModel) -> list[Path]:
    """Return the files that ``from_pretrained`` would read."""
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, find_adapter_config_file

    if find_adapter_config_file(source.pretrained_model_name_or_path, revision=source.revision) is not None:
        raise _MustLoadWhole(f"{source.pretrained_model_name_or_path} holds an adapter")
    folder = source.weights_folder()
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    index = json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())
    return [folder / name for name in sorted(set(index["weight_map"].values()))]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Have every new parameter moved to the meta device as a module takes it; buffers are computed as ever."""

    def move(_: nn.Module, __: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:  # which a tied weight is already
            return None
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    hook = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        hook.remove()


def _require_plain(model: PreTrainedModel) -> None:
    """Refuse what ``from_pretrained`` treats in ways of its own."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    config, name = model.config, type(model).__name__
    if not type(model).__module__.startswith("transformers."):
        raise _MustLoadWhole(f"{name} is not a class of transformers")
    if get_model_conversion_mapping(model, add_legacy=False):
        raise _MustLoadWhole(f"transformers converts the weights of {name} as it loads them")
    if model._get_dtype_plan(model.dtype):
        raise _MustLoadWhole(f"{name} keeps some weights in float32")
    for key in ("quantization_config", "transformers_weights", "fusion_config"):
        if getattr(config, key, None) is not None:
            raise _MustLoadWhole(f"its configuration has {key}")
    if type(config).extra_files:
        raise _MustLoadWhole(f"{name} has further weight files")
    if any(buffer.is_meta for buffer in model.buffers()):
        raise _MustLoadWhole(f"{name} computes buffers from its weights")


def _shapes_in(files: list[Path]) -> dict[_StoredWeight, torch.Size]:
    """Return the shape of every weight in the files, by its place; only their headers are read."""
    shapes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            shapes |= {
                _StoredWeight(path, key): torch.Size(file.get_slice(key).get_shape()) for key in set(file.keys())
            }
    return shapes


def _places_by_name(model: PreTrainedModel, shapes: dict[_StoredWeight, torch.Size]) -> dict[str, _StoredWeight]:
    """Return the places by the names that the weights have in ``model``, which may add or lack the model's prefix."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import rename_source_key

    state, renamings = model.state_dict(), get_checkpoint_conversion_mapping("legacy")
    places: dict[str, _StoredWeight] = {}
    for place in shapes:
        if rename_source_key(place.key, renamings, [])[0] != place.key:
            raise _MustLoadWhole(f"transformers renames {place.key} as it loads it")
        name, _ = rename_source_key(place.key, [], [], model.base_model_prefix, state)
        if name in places:
            raise _MustLoadWhole(f"the files hold {name} twice")
        places[name] = place
    return places


def _require_same(
    source: HFModel,
    model: PreTrainedModel,
    shapes: dict[_StoredWeight, torch.Size],
    places: dict[str, _StoredWeight],
    *,
    has_new_head: bool,
) -> None:
    """Refuse files whose weights are not those of ``model``, with the words of loading the whole."""
    from transformers.utils.loading_report import LoadStateDictInfo

    state, tied = model.state_dict(), model.all_tied_weights_keys
    held = {tied.get(name, name) for name in places}
    missing = {name for name in state if tied.get(name, name) not in held}
    found = LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=places.keys() - state.keys(),
        mismatched_keys={
            (name, tuple(shapes[places[name]]), tuple(state[name].shape))
            for name in state.keys() & places.keys()
            if shapes[places[name]] != state[name].shape
        },
        error_msgs=[], conversion_errors={}, skipped_pp_keys=set(),
    )  # fmt: skip
    model._adjust_missing_and_unexpected_keys(found)  # what this class of models is known to lack or to bring along
    require_complete(source.pretrained_model_name_or_path, found.to_dict(), has_new_head=has_new_head, model=model)
    if missing or found.mismatched_keys:
        name = min(missing) if missing else min(found.mismatched_keys)[0]
        raise _MustLoadWhole(f"{name} is not in the files, so it is initialised")


def _own_name(name: str) -> str:
    return _OF_ADAPTERS.sub("", name)


@torch.no_grad()
def _fill(tensor: torch.Tensor, weight: Any, device: torch.device) -> None:
    """Read a weight from its file, or of a sharded one the part that is this rank's, allocated on ``device``."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(weight[...])  # a buffer, which every rank holds
        return
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = torch.empty(shape, dtype=tensor.dtype, device=device)
    assert local.shape == tensor.to_local().shape
    if local.numel():
        part = weight[tuple(slice(first, first + size) for first, size in zip(offsets, shape, strict=True))]
        local.copy_(part)
    # Not from_local, which would move what belongs on the host to the mesh's device.
    _become(tensor, DTensor(local, tensor._spec, requires_grad=False))


def _become(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    """Put ``tensor`` into ``parameter``, which stays the same object for whoever shares it."""
    torch.utils.swap_tensors(parameter, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
