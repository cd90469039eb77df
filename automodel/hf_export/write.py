"""Write the final model as a Hugging Face directory."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from torch import nn
from transformers.utils import GENERATION_CONFIG_NAME

from automodel.distributed.parallel.handle import handle_of
from automodel.distributed.parallel.layers import is_peft_model
from automodel.distributed.runtime.agreement import run_on_all_ranks, run_on_main
from automodel.hf_export.verification import Digests, ExportError, digests_of, probe, verify

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


def export_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: Path,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    load_base: Callable[[], PreTrainedModel] | None = None,
    as_written: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict,
    must_verify: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights, configuration, generation settings and tokenizer to ``folder``, replacing what is there.

    For a model with adapters only the adapter is written, in PEFT's format. Every rank must call it: sharded weights
    are gathered in rank 0's memory.

    The files are written to ``folder.unverified`` first. Rank 0 loads them on the CPU and compares weights and logits
    with the live model; only then are they renamed to ``folder``. If that fails, they stay there, and an earlier
    ``folder`` is kept.

    Args:
        device: the device of the live model.
        autocast: makes the autocast context of the live model.
        load_base: loads the frozen weights again, to verify adapters.
        as_written: turns the whole weights of adapters into those that are written for them.
        must_verify: False skips loading and comparing.
        dtype: the dtype of the written weights, adapters excepted; None: unchanged.

    Raises:
        ExportError: on every rank, if verification failed; the message says where the files are.
    """
    handle = handle_of(model)
    unwrapped = handle.plain_model
    has_adapter = is_peft_model(unwrapped)
    weights = handle.whole_weights(only_trained=has_adapter)
    if has_adapter:
        weights = as_written(weights)

    def write(partial: Path) -> Digests:
        if dtype is not None and not has_adapter:
            _cast(weights, dtype)
        digests = digests_of(weights) if must_verify else {}
        if has_adapter:
            unwrapped.save_pretrained(partial, state_dict=weights, save_embedding_layers=False)
            write_generation_settings(unwrapped, partial)
        else:
            for alias in unwrapped.all_tied_weights_keys:
                weights.pop(alias, None)
            _save_whole(unwrapped, partial, weights, dtype=dtype)
        weights.clear()  # before a second model is loaded
        tokenizer.save_pretrained(partial)
        return digests

    unverified, digests = run_on_main(lambda: write_unverified(folder, write))
    if must_verify:
        with kept_if_unverified(unverified):
            expected = run_on_all_ranks(lambda: probe(model, device=device, autocast=autocast))
            run_on_main(lambda: verify(unverified, unwrapped, expected=expected, digests=digests, load_base=load_base))
    run_on_main(lambda: publish(unverified, folder))


def write_generation_settings(model: nn.Module, folder: Path) -> None:
    """Write the model's generation settings, such as its stop tokens; nothing for a classifier."""
    if model.can_generate():
        model.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)


def _cast(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Cast weights one by one, so that only one at a time is in memory twice."""
    for name, weight in weights.items():
        weights[name] = weight.to(dtype) if weight.is_floating_point() else weight


def _save_whole(
    model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor], *, dtype: torch.dtype | None
) -> None:
    model.save_pretrained(folder, state_dict=weights)
    if dtype not in (None, model.dtype):  # save_pretrained wrote the model's own, and loaders obey it
        model.config.dtype = dtype
        model.config.save_pretrained(folder)


def write_unverified(folder: Path, write: Callable[[Path], T]) -> tuple[Path, T]:
    """Let ``write`` fill a new folder, and name it ``folder.unverified`` once it is complete.

    Returns:
        (the folder, what ``write`` returned).
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        result = write(partial)
        unverified = _free_name(folder)
        partial.rename(unverified)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return unverified, result


@contextmanager
def kept_if_unverified(unverified: Path) -> Iterator[None]:
    """Turn any failure in the block into an ExportError that says where the files are."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, ExportError) else f"it could not be checked: {_first_line(error)}"
        raise ExportError(f"{reason}; the files are complete, and kept unverified in {unverified}") from error


def publish(unverified: Path, folder: Path) -> None:
    """Rename a written folder to its final name, replacing an earlier folder."""
    shutil.rmtree(folder, ignore_errors=True)
    unverified.rename(folder)


def _free_name(folder: Path) -> Path:
    """Return an unused name for an unverified folder."""
    names = (
        f"{folder.name}.unverified{suffix}"
        for suffix in itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    )
    return next(path for path in map(folder.with_name, names) if not path.exists())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
