"""The embedded default model: a small Llama over single characters, trainable in minutes on a laptop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from automodel.models.checks import attention_problems, fresh_model_problems
from automodel.models.hf import WeightDtype, build_fresh

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from automodel.config import Config

_MAX_LENGTH = 256


@dataclass(frozen=True)
class DemoModel:
    """What ``model=demo`` configures."""

    dtype: WeightDtype = "auto"
    attn_implementation: str | None = None

    name = "demo"
    is_stand_in = True

    @staticmethod
    def problems(section: dict[str, Any], cfg: Config, *, key: str, world_size: int) -> Iterator[str]:
        """Yield what does not fit together; see ``config/targets.py``."""
        yield from fresh_model_problems(cfg)
        yield from attention_problems(section)

    def max_length(self) -> int:
        """Return the most tokens that the model can take."""
        return _MAX_LENGTH

    def download(self) -> None:
        """Do nothing: everything is here."""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Build the character-level tokenizer."""
        from automodel.models.char_tokenizer import build_char_tokenizer

        return build_char_tokenizer()

    def build(self, tokenizer: PreTrainedTokenizerBase, *, task: Any) -> PreTrainedModel:
        """Draw fresh weights from torch's global generator."""
        from transformers import LlamaConfig

        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=_MAX_LENGTH,
            # Texts of a score of characters: slow rotations would tell no positions apart.
            rope_parameters={"rope_type": "default", "rope_theta": 100.0},
            # Wider than usual: so small a model would else spend a third of its steps growing.
            initializer_range=0.06,
            tie_word_embeddings=True,
        )
        return build_fresh(
            config,
            tokenizer,
            task=task,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
        )
