"""The final model as a Hugging Face directory."""

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
    must_verify: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights, configuration, generation settings and tokenizer to ``folder``, replacing what is there.

    Of a model with adapters, the adapter alone is written, in PEFT's format. Every rank must call it: sharded
    weights are gathered to rank 0's memory. The files are complete before anything is checked; they get the name
    ``folder`` once rank 0 has loaded them on the CPU to the weights and logits of the live model, and until then, or
    if that fails, they are in ``folder.unverified`` beside an earlier ``folder``.

    Args:
        device: where the live model computes.
        autocast: the context in which it computes.
        load_base: loads the frozen weights again, where adapters are verified.
        must_verify: False leaves the second load out.
        dtype: in which the weights of a whole model are written; None: as they are.

    Raises:
        ExportError: on every rank, where what was written could not be verified; it says where that is.
    """
    handle = handle_of(model)
    unwrapped = handle.plain_model
    has_adapter = is_peft_model(unwrapped)
    weights = handle.whole_weights(only_trained=has_adapter)

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
        weights.clear()  # before a second model comes into memory
        tokenizer.save_pretrained(partial)
        return digests

    unverified, digests = run_on_main(lambda: write_unverified(folder, write))
    if must_verify:
        with kept_if_unverified(unverified):
            expected = run_on_all_ranks(lambda: probe(model, device=device, autocast=autocast))
            run_on_main(lambda: verify(unverified, unwrapped, expected=expected, digests=digests, load_base=load_base))
    run_on_main(lambda: publish(unverified, folder))


def write_generation_settings(model: nn.Module, folder: Path) -> None:
    """Write where generation stops, with the model's other settings for it; of a classifier, nothing."""
    if model.can_generate():
        model.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)


def _cast(weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Bring weights to a type one by one, so that few are in memory twice."""
    for name, weight in weights.items():
        weights[name] = weight.to(dtype) if weight.is_floating_point() else weight


def _save_whole(
    model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor], *, dtype: torch.dtype | None
) -> None:
    model.save_pretrained(folder, state_dict=weights)
    if dtype not in (None, model.dtype):  # which the configuration now names, and a loader goes by
        model.config.dtype = dtype
        model.config.save_pretrained(folder)


def write_unverified(folder: Path, write: Callable[[Path], T]) -> tuple[Path, T]:
    """Have ``write`` fill a new folder, which appears whole beside ``folder``, under a name that says it is unverified.

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
    """Turn whatever fails in the block into an ExportError that says where the files are."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, ExportError) else f"it could not be checked: {_first_line(error)}"
        raise ExportError(f"{reason}; the files are complete, and kept unverified in {unverified}") from error


def publish(unverified: Path, folder: Path) -> None:
    """Give a written folder its final name, in the place of what had it."""
    shutil.rmtree(folder, ignore_errors=True)
    unverified.rename(folder)


def _free_name(folder: Path) -> Path:
    """Return a name for an unverified folder that no earlier one has."""
    names = (
        f"{folder.name}.unverified{suffix}"
        for suffix in itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    )
    return next(path for path in map(folder.with_name, names) if not path.exists())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
