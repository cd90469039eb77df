"""Start at the weights of an adapter that PEFT wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel.logs import get_logger, warn_for_all
from automodel.types import UserError

if TYPE_CHECKING:
    from peft import PeftModel

log = get_logger(__name__)

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_COMPARED = {"rank": ("r", 8), "alpha": ("lora_alpha", 8), "use_rslora": ("use_rslora", False),
             "use_dora": ("use_dora", False)}  # fmt: skip
"""Our keys, PEFT's names and their defaults there."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def config_problems(section: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each way in which the adapter in ``peft.init_from`` is none, or not one as ``peft`` describes.

    Only its configuration is read; ``load_adapter`` compares the weights.
    """
    folder = Path(section["init_from"]).expanduser()
    what = f"peft.init_from={section['init_from']}"
    if not folder.is_dir():
        yield f"{what}: there is no such folder; a resumed run needs none: peft.init_from=null"
        return
    if not (folder / _WEIGHTS).is_file():
        yield f"{what}: the folder has no {_WEIGHTS}{_inside(folder)}"
    config = _read_config(folder)
    if config is None:
        yield f"{what}: {_CONFIG} is missing or damaged"
        return
    if config.get("peft_type") != "LORA":
        yield f"{what} is an adapter of the kind {config.get('peft_type')}, not LORA"
        return
    for key, (name, default) in _COMPARED.items():
        has = config.get(name, default)
        if key in section and section[key] != has:
            value = json.dumps(has)
            yield f"peft.{key}={json.dumps(section[key])}, but the adapter {folder} has {value}: set peft.{key}={value}"
    for name in ("rank_pattern", "alpha_pattern", "layer_replication", "megatron_config"):
        if config.get(name):
            yield f"{what} has {name}, which is not supported"
    for name, plain in (("bias", "none"), ("lora_bias", False)):
        if config.get(name, plain) != plain:
            yield f"{what} has {name}={config[name]}, and biases are not trained here"
    if str(config.get("init_lora_weights", True)).startswith(_CHANGES_BASE):
        yield (
            f"{what} belongs to weights that its start (init_lora_weights={config['init_lora_weights']}) has changed: "
            "convert it to one of the original weights first (PEFT's path_initial_model_for_weight_conversion)"
        )


def load_adapter(model: PeftModel, folder: str) -> None:
    """Copy the weights of the adapter in ``folder`` into ``model``, whose own adapter has the same names and shapes.

    Raises:
        UserError: the file is damaged, or it holds other weights.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    what, path = f"peft.init_from={folder}", Path(folder).expanduser()
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    try:
        with safe_open(path / _WEIGHTS, framework="pt") as file:
            names = set(file.keys())
            problems = list(_misfits(own, {name: file.get_slice(name).get_shape() for name in names}))
            if problems:
                raise UserError(*(f"{what}: {line}{_targets_of(path)}" for line in problems))
            for name, weight in own.items():
                loaded = file.get_tensor(name)
                if not loaded.isfinite().all():
                    raise UserError(f"{what}: {name} holds numbers that are not finite")
                with torch.no_grad():
                    weight.copy_(loaded)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{what}: {_WEIGHTS} cannot be read, so it is damaged ({error})") from error
    base, its_base = model.get_base_model().name_or_path, (_read_config(path) or {}).get("base_model_name_or_path")
    if its_base and its_base != base:
        warn_for_all(
            log, "%s was trained on %s and starts on %s: the two must hold the same weights", what, its_base, base
        )
    log.info("the adapter starts at the weights in %s", path)


def _read_config(folder: Path) -> dict[str, Any] | None:
    try:
        config = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _inside(folder: Path) -> str:
    if (folder / "adapter_model.bin").is_file():
        return " (only adapter_model.bin; pickled weights are not loaded, since they can run code)"
    found = sorted(folder.glob(f"*/{_WEIGHTS}"))
    return f"; {found[-1].parent} has one" if found else ""


def _misfits(own: dict[str, Any], shapes: dict[str, list[int]]) -> Iterator[str]:
    missing, unknown = sorted(own.keys() - shapes.keys()), sorted(shapes.keys() - own.keys())
    if missing:
        yield f"{len(missing)} weights of the model's adapter are missing from it, such as {missing[0]}"
    if unknown:
        yield f"{len(unknown)} of its weights are unknown to the model's adapter, such as {unknown[0]}"
    others = [name for name in sorted(own.keys() & shapes.keys()) if list(own[name].shape) != shapes[name]]
    if others:
        name = others[0]
        yield f"{len(others)} weights are of another shape, such as {name}: {shapes[name]}, not {list(own[name].shape)}"


def _targets_of(folder: Path) -> str:
    config, shown = _read_config(folder) or {}, []
    for key in ("target_modules", "target_parameters", "modules_to_save"):
        names = config.get(key)
        if isinstance(names, list):  # PEFT may write whole names, with the number of each layer
            names = f"[{','.join(sorted({name.rpartition('.')[2] for name in names}))}]"
        if names:
            shown.append(f"peft.{key}={names}")
    return f"; its configuration says {' '.join(shown)}" if shown else ""
