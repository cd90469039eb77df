"""The final model as a Hugging Face directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from automodel.distributed.ordering import run_on_main

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, folder: Path) -> None:
    """Write weights, configuration, generation settings and tokenizer to ``folder``, replacing what is there.

    Every rank must call it: sharded weights are gathered to rank 0's memory. The folder appears whole or not.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    unwrapped: PreTrainedModel = getattr(model, "module", model)

    def write() -> None:
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        if unwrapped.config.tie_word_embeddings:
            for alias in _tied_aliases(unwrapped):
                weights.pop(alias, None)
        unwrapped.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    run_on_main(write)


def _tied_aliases(model: PreTrainedModel) -> list[str]:
    """Return the names under which a tied weight stands a second time; only its source is written."""
    return list(model._tied_weights_keys or ())
