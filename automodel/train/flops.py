"""FLOPs of a training step and peak FLOPs of a device, for model FLOPs utilisation (MFU)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from automodel.distributed.parallel.handle import unwrap
from automodel.distributed.parallel.layers import num_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_H100_SXM, _H100_NVL, _A100 = 989.4, 835.5, 312.0
_PEAK_TFLOPS = {
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A800-SXM4-80GB": _A100,
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 NVL": _H100_NVL,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H800": _H100_SXM,
    "NVIDIA H200": _H100_SXM,
    "NVIDIA H200 NVL": _H100_NVL,
    "NVIDIA GH200 480GB": _H100_SXM,
    "NVIDIA B200": 2250.0,
    "NVIDIA A10": 125.0,
    "NVIDIA A30": 165.0,
    "NVIDIA A40": 149.7,
    "NVIDIA L4": 121.0,
    "NVIDIA L40": 181.05,
    "NVIDIA L40S": 362.05,
    "NVIDIA RTX A6000": 154.8,
    "NVIDIA RTX 6000 Ada Generation": 364.2,
    "NVIDIA GeForce RTX 3090": 71.0,
    "NVIDIA GeForce RTX 4090": 165.2,
}
"""Dense bf16 peaks with float32 accumulation, from NVIDIA's data sheets, by the driver's name of the device."""


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of a forward and backward pass.

    Attributes:
        per_token: in the matrix multiplications by weights, without the output layer.
        per_label_token: in the output layer of a language model, whose logits only supervised tokens need.
        per_squared_length: in attention, per unit of a document's squared length.
    """

    per_token: float = 0.0
    per_squared_length: float = 0.0
    per_label_token: float = 0.0

    def total(self, *, num_tokens: int, num_label_tokens: int, sum_squared_lengths: int) -> float:
        """Return the FLOPs for documents with ``num_tokens`` in total, given the sum of their squared lengths."""
        by_weights = self.per_token * num_tokens + self.per_label_token * num_label_tokens
        return by_weights + self.per_squared_length * sum_squared_lengths


def training_flops(model: nn.Module) -> TrainingFlops:
    """Count the FLOPs of a training step of ``model``, perhaps wrapped or sharded.

    As in PaLM (Chowdhery et al. 2022, appendix B), a trained weight takes 6 FLOPs per token: 2 in the forward pass, 2
    for the gradient of its input, 2 for its own gradient. A frozen weight has no gradient and takes 4. Attention takes
    12 x layers x heads x head size per token and position of its document, causal or not.

    Only matrix multiplications count. An embedding is looked up and does not count, unless it is tied to the output
    layer. The output layer counts for supervised tokens alone, also with a loss that computes all logits. Of stacked
    expert weights [experts, ...] the share that a token is routed to counts. Recomputation does not.
    """
    plain = unwrap(model)
    config = plain.config.get_text_config()
    layer = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    of_output_layer = set() if layer is None else {id(parameter) for parameter in layer.parameters()}
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    matrices = {
        id(parameter): parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)  # a tied weight has two names
        if parameter.ndim >= 2 and name.rpartition(".")[0] not in embeddings
    }

    def total(of_output: bool) -> float:
        return sum(
            (6 if matrix.requires_grad else 4) * num_weights(matrix) * _share_used(matrix, config)
            for key, matrix in matrices.items()
            if (key in of_output_layer) == of_output
        )

    num_layers, num_heads = _number(config, "num_hidden_layers"), _number(config, "num_attention_heads")
    width = num_heads * _number(config, "head_dim") or (_number(config, "hidden_size") if num_heads else 0)
    return TrainingFlops(total(False), 12.0 * num_layers * width, per_label_token=total(True))


def peak_flops_per_sec(device_name: str) -> float | None:
    """Return the dense bf16 peak of a device by its exact name; None if it is unknown, as for a slice of a device."""
    tflops = _PEAK_TFLOPS.get(device_name)
    return None if tflops is None else tflops * 1e12


def _share_used(weight: nn.Parameter, config: PretrainedConfig) -> float:
    experts_per_token = _number(config, "num_experts_per_tok")
    return experts_per_token / weight.shape[0] if experts_per_token and weight.ndim == 3 else 1.0


def _number(config: PretrainedConfig, name: str) -> int:
    """Return an integer entry of ``config``; 0 if the model has none, or one that differs between layers."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0
