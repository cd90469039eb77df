"""Check what ``model`` names before it is loaded: a folder that holds no model is recognised for what it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from automodel.config.paths import looks_like_path

if TYPE_CHECKING:
    from automodel.config import Config

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_ATTENTION_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}


def model_problems(key: str, path: str | None) -> Iterator[str]:
    """Yield a line for each reason why ``path``, the value of ``key``, cannot be loaded as a pretrained model."""
    what, folder = f"{key}={path}", _folder(path)
    if folder is None:
        yield from _no_folder(key, path)
        return
    other = _what_else(folder)
    if other is not None:
        yield f"{what} is {other}"
        return
    if not (folder / "config.json").is_file():
        yield f"{what}: the folder has no config.json{_below(folder)}"
    if not any(folder.glob("*.safetensors")):
        pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        found = f" (only {pickles[0].name}; pickled weights are not loaded, since they can run code)" if pickles else ""
        yield f"{what}: the folder has no *.safetensors weights{found}"
    yield from tokenizer_problems(key, path)


def tokenizer_problems(key: str, path: str | None) -> Iterator[str]:
    """Yield a line where ``path``, the value of ``key``, is a local one without a tokenizer."""
    folder = _folder(path)
    if folder is None:
        yield from _no_folder(key, path)
    elif not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        yield f"{key}={path}: the folder has no tokenizer (tokenizer.json, tokenizer.model or vocab.*)"


def fresh_model_problems(cfg: Config) -> Iterator[str]:
    """Yield what does not go with fresh weights."""
    if cfg.peft is not None:
        yield "peft trains adapters on pretrained weights, and this model has fresh ones: choose model=hf, or peft=none"


def attention_problems(section: dict[str, Any]) -> Iterator[str]:
    """Yield a line where ``model.attn_implementation`` needs a package that is missing."""
    attention = section.get("attn_implementation")
    package = _ATTENTION_PACKAGES.get(str(attention))
    if package is not None and find_spec(package) is None and find_spec("kernels") is None:
        yield (
            f"model.attn_implementation={attention} needs a GPU and the package {package.replace('_', '-')} (or "
            "kernels), which is not installed; model.attn_implementation=sdpa needs neither"
        )


def _folder(path: str | None) -> Path | None:
    folder = None if path is None else Path(path).expanduser()
    return folder if folder is not None and folder.is_dir() else None


def _no_folder(key: str, path: str | None) -> Iterator[str]:
    """Say what is wrong with a path that is no folder; a hub id is fine."""
    if path is None:
        return
    if Path(path).expanduser().exists():
        yield f"{key}={path} must be a folder or a hub id, not a file"
    elif looks_like_path(path):
        yield f"{key}={path}: there is no such folder"


def _what_else(folder: Path) -> str | None:
    """Return what a folder is that holds no whole model, and what to give instead; None where it seems to hold one."""
    if (folder / "config.json").is_file():
        return None
    if (folder / "adapter_config.json").is_file():
        return f"an adapter{_on_its_base(folder)}"
    if (folder / "run.json").is_file():
        return _what_run(folder)
    if (folder / "manifest.json").is_file() or any(folder.glob("*.distcp")):
        return f"a training checkpoint: write a model from it, python -m automodel.export {folder} OUT, and give OUT"
    steps = sorted(folder.glob("step_*"))
    if steps:
        return f"a folder of training checkpoints: python -m automodel.export {steps[-1]} OUT, and give OUT"
    if any(folder.glob("*.gguf")):
        return "a folder of GGUF files, which are not trained; give the model that they were made from"
    return None


def _what_run(folder: Path) -> str:
    model = folder / "model"
    if (model / "config.json").is_file():
        return f"the folder of a run; its model is {model}"
    if (model / "adapter_config.json").is_file():
        return f"the folder of a run, whose model is an adapter{_on_its_base(model)}"
    latest = folder / "checkpoints" / "latest"
    return f"the folder of a run that has no model yet; python -m automodel.export {latest} OUT writes one"


def _on_its_base(folder: Path) -> str:
    try:
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    return (
        f" and no whole model{f': its base is {base}' if base else ''}; give the base to train a new adapter, or "
        "add this one to its weights first (python -m automodel.export CHECKPOINT OUT export.merge=true, or PEFT's "
        "merge_and_unload) and give the result"
    )


def _below(folder: Path) -> str:
    found = sorted([*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")])
    return f"; {found[-1].parent} has one" if found else ""
