"""A model whose attention overlooks where packed documents begin; named as a user would name a model of their own."""

from __future__ import annotations

from typing import Any

from automodel.models.hf import HFModel


class LeakyModel(HFModel):
    def build(self, *args: Any, **options: Any) -> Any:
        model = super().build(*args, **options)
        forward = model.forward

        def overlooking(*args: Any, position_ids: Any = None, **inputs: Any) -> Any:
            return forward(*args, **inputs)

        model.forward = overlooking
        return model
