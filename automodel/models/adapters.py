"""Adapters on frozen weights, by the PEFT library."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from automodel.config.names import sorted_by_likeness
from automodel.models.adapter_checks import adapter_problems, starts_at_factors
from automodel.types import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from automodel.config import Config


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021), with rsLoRA (Kalajdzievski 2023) and DoRA (Liu et al. 2024).

    What ``peft=lora``, ``peft=dora`` and ``peft=qlora`` configure; see ``conf/peft/lora.yaml``. ``lr_ratio`` is for
    the optimizer (``optim/optimizers.py``).
    """

    rank: PositiveInt = 16
    alpha: PositiveFloat = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"
    target_parameters: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    init_from: str | None = None
    lr_ratio: PositiveFloat | None = None
    quantization: Literal["nf4", "fp4"] | None = None
    double_quantization: bool = True
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"

    @staticmethod
    def problems(section: dict[str, Any], cfg: Config, *, key: str, world_size: int) -> Iterator[str]:
        """Yield what does not fit together; see ``config/targets.py``."""
        yield from adapter_problems(section, cfg)

    @property
    def needs_whole_weights(self) -> str | None:
        """Why adapters cannot be added before the weights are loaded, or None where they can."""
        if self.use_dora:
            return "DoRA begins with the norms of whole weights"
        if self.starts_at_factors:
            return f"peft.init_lora_weights={self.init_lora_weights} begins with factors of whole weights"
        if self.init_from is not None and self.modules_to_save:
            return "peft.init_from brings modules that are trained whole"
        return None

    @property
    def starts_at_factors(self) -> bool:
        """Whether adapters start at factors of the weights; see ``adapter_starts.py``."""
        return starts_at_factors(self.init_lora_weights)

    def loading_options(self) -> dict[str, Any]:
        """Return the keyword arguments with which ``HFModel.build`` quantizes the weights that it loads."""
        if self.quantization is None:
            return {}
        import torch
        from transformers import BitsAndBytesConfig

        return {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=self.quantization,
                bnb_4bit_use_double_quant=self.double_quantization,
                bnb_4bit_compute_dtype=getattr(torch, self.compute_dtype),
            )
        }

    def apply(self, model: PreTrainedModel, *, task: Any, new_token_ids: Sequence[int] = ()) -> PeftModel:
        """Freeze ``model`` and add adapters drawn from torch's global generator; a new classifier head is trained.

        Until ``start`` is called, adapters that start at factors or at another adapter have plain numbers.

        Args:
            new_token_ids: tokens whose rows of the embedding (and of the output) are trained and saved as well.

        Raises:
            UserError: a name of ``target_modules``, ``target_parameters`` or ``modules_to_save`` is not in the model.
        """
        from peft import LoraConfig, get_peft_model

        problems = [*_unknown_modules(model, "peft.target_modules", self.target_modules)]
        problems += _unknown_modules(model, "peft.modules_to_save", self.modules_to_save or [])
        problems += _unknown_parameters(model, self.target_parameters or [])
        if problems:
            raise UserError(*problems)
        config = LoraConfig(
            task_type=task.peft_type,
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            target_parameters=self.target_parameters,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            modules_to_save=self.modules_to_save,
            init_lora_weights=True if self.starts_at_factors else self.init_lora_weights,
            trainable_token_indices=_rows_of(model, new_token_ids) if new_token_ids else None,
        )
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"peft.target_modules={self.target_modules}: {str(error).splitlines()[0]}") from error

    def start(self, model: PeftModel) -> None:
        """Give the adapters of ``model`` the numbers that a new run starts with; every rank must call it.

        Args:
            model: what ``apply`` returned; its own weights are loaded if ``needs_whole_weights``.

        Raises:
            UserError: on every rank, where the model or the adapter in ``init_from`` does not allow it.
        """
        if self.init_from is not None:
            from automodel.distributed.runtime.agreement import run_on_all_ranks
            from automodel.models.adapter_files import load_adapter

            run_on_all_ranks(lambda: load_adapter(model, self.init_from))
        if self.starts_at_factors:
            from automodel.models.adapter_starts import start_at_factors

            if problem := merge_problem(model):
                raise UserError(f"peft.init_lora_weights={self.init_lora_weights}: {problem}")
            start_at_factors(model, self.init_lora_weights)

    def exported(self) -> LoRA:
        """Return the adapters as they are written: those that started at factors have twice the rank."""
        if not self.starts_at_factors:
            return self
        from automodel.models.adapter_starts import plain_shape

        rank, alpha = plain_shape(self.rank, self.alpha, use_rslora=self.use_rslora)
        return replace(self, rank=rank, alpha=alpha, init_lora_weights=True)


def is_adapted(model: nn.Module) -> bool:
    """Return whether a model, perhaps wrapped, has PEFT's adapters."""
    from automodel.distributed.parallel.handle import unwrap
    from automodel.distributed.parallel.layers import is_peft_model

    return is_peft_model(unwrap(model))


def described(model: PeftModel) -> str:
    """Say which weights of a model with adapters have one, and which are frozen without one, embeddings aside."""
    from peft.tuners.lora import ParamWrapper
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import nn

    base, layers = model.get_base_model(), {}
    covered = {id(m.weight) for m in base.modules() if isinstance(m, nn.Embedding)}
    for name, module in base.named_modules():
        if isinstance(module, ParamWrapper):  # of one weight, around a module that may have others
            layers[f"{name.replace('.base_layer', '')}.{module.parameter_name}"] = module
            covered.add(id(module.get_param()))
        elif isinstance(module, BaseTunerLayer):
            layers[name] = module
            covered |= {id(parameter) for parameter in module.parameters()}
    without = [
        name.removesuffix(".weight").replace(".base_layer", "")
        for name, parameter in base.named_parameters()
        if parameter.ndim > 1 and not parameter.requires_grad and id(parameter) not in covered
    ]
    with_one = _last_parts(name.removesuffix(".base_layer") for name in layers)
    rest = f"; without one, frozen: {', '.join(_last_parts(without, num_parts=2))}" if without else ""
    return f"adapters on {', '.join(with_one)}{rest}"


def merge_problem(model: PeftModel) -> str | None:
    """Return why the adapters cannot be added to the weights, or None where they can."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = model.get_base_model().get_output_embeddings()
    if not isinstance(head, BaseTunerLayer) or not model.get_base_model().config.get_text_config().tie_word_embeddings:
        return None
    return (
        "peft.target_modules includes the output layer, whose weight is the embedding's as well: the adapter works as "
        "it is, but export.merge=true would change the embedding too and fails; leave the output layer out to merge"
    )


def _unknown_modules(model: nn.Module, key: str, names: str | list[str]) -> Iterator[str]:
    """Yield a line for each name that is that of no module, with the nearest ones that are."""
    modules = [name for name, _ in model.named_modules() if name]
    if isinstance(names, str):
        if names.lower() == "all-linear" or _matches(names, modules):
            return
        if any(module == names or module.endswith(f".{names}") for module in modules):
            yield f"{key}={names} is one pattern of whole names, which none has; write it as a list: {key}=[{names}]"
            return
        names = [names]
    what = f"{key}={names}"
    linear = list(_last_parts(name for name, module in model.named_modules() if _is_linear(module)))
    for name in names:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            near = ", ".join(sorted_by_likeness(name, linear))
            yield f"{what}: the model has no module {name}; its linear ones, nearest first: {near}"


def _unknown_parameters(model: nn.Module, names: list[str]) -> Iterator[str]:
    """Yield a line for each name that is that of no weight outside a linear layer, with the nearest ones that are."""
    linear = {id(module.weight) for module in model.modules() if _is_linear(module)}
    fused = [name for name, weight in model.named_parameters() if weight.ndim in (2, 3) and id(weight) not in linear]
    for name in names:
        if not any(parameter == name or parameter.endswith(f".{name}") for parameter in fused):
            near = sorted_by_likeness(name, list(_last_parts(fused, num_parts=2)))
            yield (
                f"peft.target_parameters={names}: the model has no weight {name} outside its linear layers, which "
                f"peft.target_modules adapts; there are: {', '.join(near)}"
            )


def _matches(pattern: str, names: list[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error:
        return False


def _is_linear(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "ndim", 0) == 2 and type(module).__name__ != "Embedding"


def _last_parts(names: Iterable[str], *, num_parts: int = 1) -> dict[str, None]:
    """Return the ends of dotted names, each once, without numbers of layers."""
    parts = ([part for part in name.split(".") if not part.isdecimal()] for name in names)
    return dict.fromkeys(".".join(each[-num_parts:]) for each in parts)


def _rows_of(model: PreTrainedModel, token_ids: Sequence[int]) -> dict[str, list[int]]:
    """Return the tokens by the names of the layers that have a row for each; a tied output follows the embedding."""
    layers = [model.get_input_embeddings()]
    output = model.get_output_embeddings()
    if output is not None and output.weight is not layers[0].weight:
        layers.append(output)
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    return {name.rpartition(".")[2]: list(token_ids) for name in names}
