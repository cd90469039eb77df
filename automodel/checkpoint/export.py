"""The final model as a Hugging Face directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from automodel.distributed.megatron_fsdp import full_state_dict
from automodel.distributed.ordering import run_on_main
from automodel.distributed.wrappers import is_megatron_fsdp, is_peft_model, unwrap

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, folder: Path) -> None:
    """Write weights, configuration, generation settings and tokenizer to ``folder``, replacing what is there.

    Of a model with adapters, the adapter alone is written, in PEFT's format. Every rank must call it: sharded
    weights are gathered to rank 0's memory. The folder appears whole or not.
    """
    unwrapped = unwrap(model)
    has_adapter = is_peft_model(unwrapped)
    weights = _whole_weights(model, only_trained=has_adapter)

    def write() -> None:
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        if has_adapter:
            unwrapped.save_pretrained(partial, state_dict=weights, save_embedding_layers=False)
        else:
            if unwrapped.config.tie_word_embeddings:
                for alias in _tied_aliases(unwrapped):
                    weights.pop(alias, None)
            unwrapped.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    run_on_main(write)


def _whole_weights(model: nn.Module, *, only_trained: bool) -> dict[str, torch.Tensor]:
    if is_megatron_fsdp(model):
        trained = {name for name, parameter in model.module.named_parameters() if parameter.requires_grad}
        return full_state_dict(model, names=trained if only_trained else None)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=only_trained)
    return get_model_state_dict(model, options=options)


def _tied_aliases(model: PreTrainedModel) -> list[str]:
    """Return the names under which a tied weight stands a second time; only its source is written."""
    return list(model._tied_weights_keys or ())
