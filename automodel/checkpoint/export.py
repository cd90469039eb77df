"""The final model as a Hugging Face directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers.utils import GENERATION_CONFIG_NAME

from automodel.checkpoint.verification import probe, verify
from automodel.distributed.megatron_fsdp import full_state_dict
from automodel.distributed.ordering import run_on_main
from automodel.distributed.wrappers import is_megatron_fsdp, is_peft_model, unwrap

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    folder: Path,
    device: torch.device | str = "cpu",
    load_base: Callable[[], PreTrainedModel] | None = None,
    must_verify: bool = True,
    dtype: torch.dtype | None = None,
) -> None:
    """Write weights, configuration, generation settings and tokenizer to ``folder``, replacing what is there.

    Of a model with adapters, the adapter alone is written, in PEFT's format. Every rank must call it: sharded
    weights are gathered to rank 0's memory. The folder appears whole or not, and only once rank 0 has loaded it
    on the CPU to the logits of the live model.

    Args:
        device: where the live model computes.
        load_base: loads the frozen weights again, where adapters are verified.
        must_verify: False leaves the second load out.
        dtype: in which the weights of a whole model are written; None: as they are.

    Raises:
        ExportError: on every rank, where what was written does not load to this model.
    """
    unwrapped = unwrap(model)
    has_adapter = is_peft_model(unwrapped)
    weights = _whole_weights(model, only_trained=has_adapter)
    expected = probe(model, device=device) if must_verify else None

    def write() -> None:
        with appearing_whole(folder) as partial:
            if has_adapter:
                unwrapped.save_pretrained(partial, state_dict=weights, save_embedding_layers=False)
                write_generation_settings(unwrapped, partial)
            else:
                for alias in unwrapped.all_tied_weights_keys:
                    weights.pop(alias, None)
                _save_whole(unwrapped, partial, weights, dtype=dtype)
            weights.clear()  # before a second model comes into memory
            tokenizer.save_pretrained(partial)
            if expected is not None:
                verify(partial, unwrapped, expected=expected, load_base=load_base)

    run_on_main(write)


def write_generation_settings(model: nn.Module, folder: Path) -> None:
    """Write where generation stops, with the model's other settings for it; of a classifier, nothing."""
    if model.can_generate():
        model.generation_config.to_json_file(folder / GENERATION_CONFIG_NAME)


def _save_whole(
    model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor], *, dtype: torch.dtype | None
) -> None:
    if dtype is not None:
        for name, weight in weights.items():
            weights[name] = weight.to(dtype) if weight.is_floating_point() else weight
    model.save_pretrained(folder, state_dict=weights)
    if dtype not in (None, model.dtype):  # which the configuration now names, and a loader goes by
        model.config.dtype = dtype
        model.config.save_pretrained(folder)


@contextmanager
def appearing_whole(folder: Path) -> Iterator[Path]:
    """Give a new folder to write to, which takes the place of ``folder`` at the end, or goes if anything fails."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _whole_weights(model: nn.Module, *, only_trained: bool) -> dict[str, torch.Tensor]:
    if is_megatron_fsdp(model):
        trained = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
        return full_state_dict(model, names=trained if only_trained else None)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=only_trained)
    return get_model_state_dict(model, options=options)
