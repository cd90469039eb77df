"""Adapters on frozen weights, by the PEFT library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from automodel.types import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Task = Literal["CAUSAL_LM", "SEQ_CLS"]


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021), with rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024).

    What ``peft=lora`` and ``peft=dora`` configure; see ``conf/peft/lora.yaml``.
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None

    def apply(self, model: PreTrainedModel, *, task: Task) -> PeftModel:
        """Freeze ``model`` and add adapters drawn from torch's global generator; a new classifier head is trained.

        Raises:
            UserError: no module of the model is named by ``target_modules``.
        """
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            task_type=task,
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            modules_to_save=self.modules_to_save,
        )
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"peft.target_modules={self.target_modules}: {str(error).splitlines()[0]}") from error
