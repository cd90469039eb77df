"""Adapters that start at factors of the weights compute what the model did, and are written as plain ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft  # noqa: F401 - so that the ranks need not import it
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from automodel.distributed.parallel.ddp import DDP
from automodel.distributed.parallel.fsdp2 import FSDP2
from automodel.distributed.parallel.handle import handle_of
from automodel.distributed.parallel.layers import num_weights
from automodel.models.adapter_starts import as_plain_adapter, follow_starts, starts_of
from automodel.models.adapters import LoRA
from automodel.models.hf import HFModel
from automodel.runner.models import build_model
from automodel.tasks.causal_lm import CausalLM
from automodel.types import UserError
from tests.dist.tiny import VOCAB, cpu_info, full, tiny_llama

TOKENS = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(3))
STARTS = ["pissa", "pissa_niter_4", "olora"]


def started(start: str = "pissa", *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    adapters = LoRA(rank=4, alpha=6, init_lora_weights=start, **options)
    model = adapters.apply(tiny_llama().to(dtype), task=CausalLM())
    adapters.start(model)
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits.float()


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def disturb(model: nn.Module) -> None:
    """Change the adapters as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


def from_its_start(start: str, dtype: torch.dtype) -> tuple[float, float]:
    """Return how far the logits are from the base model's, at the start and after a disturbance."""
    expected, model = logits(tiny_llama().to(dtype)), started(start, dtype=dtype)
    at_start = distance(logits(model), expected)
    disturb(model)
    return at_start, distance(logits(model), expected)


@pytest.mark.parametrize("start", STARTS)
def test_the_model_computes_at_the_start_what_its_base_does(one_rank, start):
    ((at_start, later),) = one_rank.run(from_its_start, start, torch.float32)
    assert at_start < 1e-5 < 1e-2 < later
    ((at_start, later),) = one_rank.run(from_its_start, start, torch.bfloat16)
    assert at_start < 2e-2 < later  # the subtracted weights are rounded to bf16


def unlike_peft(start: str) -> list[str]:
    """Return the names of the weights that PEFT's own start makes otherwise."""
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=start, task_type="CAUSAL_LM")
    torch.manual_seed(5)
    expected = get_peft_model(tiny_llama(), config).state_dict()
    got = started(start).state_dict()
    others = [name for name, weight in expected.items() if not torch.allclose(weight, got[name], atol=1e-6)]
    return others + [name for name in got.keys() - expected.keys() if not name.endswith(("start_A", "start_B"))]


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_the_numbers_are_those_of_peft(one_rank, start):
    assert one_rank.run(unlike_peft, start) == [[]]


def plain_distance(use_rslora: bool) -> tuple[float, int, float]:
    """Return how far the written adapter, on the untouched base, is from the model that was trained."""
    adapters = LoRA(rank=4, alpha=6, init_lora_weights="pissa", use_rslora=use_rslora)
    model = started(use_rslora=use_rslora)
    disturb(model)
    plain = adapters.exported().apply(tiny_llama(), task=CausalLM())
    weights = as_plain_adapter(handle_of(model).whole_weights(only_trained=True))
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert not unexpected and not any("lora_" in name for name in missing)
    config = model.peft_config["default"]
    return distance(logits(plain), logits(model)), config.r, config.lora_alpha


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_written_adapter_is_one_of_the_original_weights(one_rank, use_rslora):
    ((found, rank, alpha),) = one_rank.run(plain_distance, use_rslora)
    assert found < 1e-5
    assert (rank, alpha) == (8, pytest.approx(6 * 2**0.5 if use_rslora else 12))


def after_a_checkpoint(strategy: Any) -> float:
    """Bring other factors as a checkpoint would; return the largest error of what is left of the frozen weights."""
    whole, info = tiny_llama().state_dict(), cpu_info()
    model = strategy.parallelize(started(), dist_info=info, mesh=strategy.build_mesh(info))
    before = starts_of(model)
    assert before
    generator = torch.Generator().manual_seed(9)
    for name, buffer in model.named_buffers():
        if name in before:
            buffer += 0.3 * torch.randn(buffer.shape, generator=generator)
    follow_starts(model, before)
    worst = 0.0
    for name, layer in handle_of(model).plain_model.named_modules():
        if hasattr(layer, "start_A"):
            clean = name.removeprefix("base_model.model.") + ".weight"
            expected = whole[clean] - 1.5 * layer.start_B @ layer.start_A
            worst = max(worst, (full(layer.base_layer.weight) - expected).abs().max().item())
    return worst


@pytest.mark.parametrize("strategy", [DDP(), FSDP2(), FSDP2(tp_size=2)], ids=["ddp", "fsdp2", "tp"])
def test_the_factors_of_a_checkpoint_replace_those_that_are_computed_again(two_ranks, strategy):
    assert max(two_ranks.run(after_a_checkpoint, strategy)) < 1e-5


def unchanged_weights() -> bool:
    model = started()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    follow_starts(model, starts_of(model))
    return all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_the_same_factors_change_no_bit(one_rank):
    assert one_rank.run(unchanged_weights) == [True]


def factors_where_ranks_differ() -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix of this rank and rank 0's own, where processors compute other factors."""
    model = LoRA(rank=4, init_lora_weights="pissa").apply(tiny_llama(), task=CausalLM())
    for parameter in model.parameters():
        parameter.data *= 1 + dist.get_rank()
    LoRA(rank=4, init_lora_weights="pissa").start(model)
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    return layer.lora_A["default"].weight.detach(), layer.start_B


def test_all_ranks_start_at_the_factors_of_the_first(two_ranks):
    (one, start), (other, other_start) = two_ranks.run(factors_where_ranks_differ)
    assert torch.equal(one, other) and torch.equal(start, other_start)


def refused(model_options: dict[str, Any], options: dict[str, Any]) -> str:
    try:
        LoRA(init_lora_weights="pissa", **options).start(
            LoRA(**options).apply(tiny_llama(**model_options), task=CausalLM())
        )
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("model_options", "options", "message"),
    [
        (
            {},
            {"rank": 17},
            "peft.rank=17 is more than base_model.model.model.layers.0.self_attn.q_proj has factors: 16",
        ),
        ({}, {"rank": 4, "target_modules": ["embed_tokens"]}, "linear layers alone, and base_model.model.model.embed"),
        ({"tied": True}, {"rank": 4, "target_modules": ["lm_head"]}, "whose weight is the embedding's as well"),
    ],
    ids=["rank", "embedding", "tied"],
)
def test_what_has_no_factors_is_refused(one_rank, model_options, options, message):
    (told,) = one_rank.run(refused, model_options, options)
    assert message in told


class Packed(nn.Parameter):
    """A weight as bitsandbytes holds it: two in a byte, with the shape beside them."""


def loaded_quantized() -> tuple[list[Any], set[torch.dtype], set[torch.dtype], int]:
    """Build the model of a run with ``peft=qlora``, whose loading is a stand-in that notes what it is given."""
    given, info, strategy = [], cpu_info(), DDP()

    def build(self: HFModel, tokenizer: Any, *, task: Any, quantization_config: Any = None) -> nn.Module:
        given.append(quantization_config)
        model = tiny_llama().to(torch.bfloat16)
        packed = model.lm_head.weight = Packed(torch.zeros(VOCAB * 16 // 2, 1, dtype=torch.uint8), requires_grad=False)
        packed.quant_state = SimpleNamespace(shape=(VOCAB, 16))
        return model

    cfg = SimpleNamespace(
        peft={"_target_": "automodel.models.adapters.LoRA", "quantization": "nf4", "target_modules": ["q_proj"]},
        rng=SimpleNamespace(seed=1),
    )
    job = SimpleNamespace(
        cfg=cfg, dist_info=info, strategy=strategy, mesh=strategy.build_mesh(info), dp=SimpleNamespace(rank=0),
        precision=SimpleNamespace(held=torch.bfloat16, trained=torch.float32),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HFModel, "build", build)
        patch.setattr(HFModel, "weights_fingerprint", lambda self: "")
        trained = build_model(job, HFModel("a/b"), None, task=CausalLM())
        trained.load_base()
    of_trained, of_frozen = (
        {weight.dtype for weight in trained.module.parameters() if weight.requires_grad is is_trained}
        for is_trained in (True, False)
    )
    return given, of_trained, of_frozen, num_weights(trained.module.get_base_model().lm_head.weight)


def test_quantized_weights_are_loaded_for_the_run_and_for_its_export_and_stay_as_they_are(one_rank):
    ((given, of_trained, of_frozen, num_packed),) = one_rank.run(loaded_quantized)
    assert [config.bnb_4bit_quant_type for config in given] == ["nf4", "nf4"]
    assert of_trained == {torch.float32} and of_frozen == {torch.bfloat16, torch.uint8}
    assert num_packed == VOCAB * 16


def saved_adapter(folder: Path, **options: Any) -> torch.Tensor:
    """Write an adapter that does something, and return its logits."""
    torch.manual_seed(2)
    model = LoRA(rank=4, alpha=6, **options).apply(tiny_llama(), task=CausalLM())
    disturb(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits(model)


def continued(folder: Path, options: dict[str, Any]) -> torch.Tensor | str:
    adapters = LoRA(rank=4, alpha=6, init_from=str(folder), **options)
    try:
        model = adapters.apply(tiny_llama(), task=CausalLM())
        adapters.start(model)
    except UserError as error:
        return str(error)
    return logits(model)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}],
    ids=["lora", "dora", "a module trained whole", "embedding"],
)
def test_an_adapter_continues_with_its_logits(two_ranks, tmp_path, options):
    (expected, _) = two_ranks.run(save_on_first, tmp_path / "adapter", options)
    for got in two_ranks.run(continued, tmp_path / "adapter", options):
        assert torch.equal(got, expected)
    assert distance(expected, logits(tiny_llama())) > 1e-2


def save_on_first(folder: Path, options: dict[str, Any]) -> torch.Tensor | None:
    return saved_adapter(folder, **options) if dist.get_rank() == 0 else None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change(path: Path, edit: Any) -> None:
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (cut, {}, "adapter_model.safetensors cannot be read, so it is damaged"),
        (
            lambda path: change(path, lambda w: w.pop(min(w))),
            {},
            "1 weights of the model's adapter are missing from it",
        ),
        (lambda path: change(path, lambda w: w[min(w)].fill_(float("nan"))), {}, "numbers that are not finite"),
        (lambda path: change(path, lambda w: w.update({min(w): torch.ones(3, 16)})), {}, "[3, 16], not [4, 32]"),
        (
            lambda path: None,
            {"target_modules": ["q_proj"]},
            "of its weights are unknown to the model's adapter, such as base_model.model.model.layers.0.mlp.down_proj",
        ),
    ],
    ids=["cut", "missing", "nan", "shape", "targets"],
)
def test_an_adapter_that_does_not_fit_is_refused(one_rank, tmp_path, damage, options, message):
    one_rank.run(save_on_first, tmp_path, {})
    damage(tmp_path / "adapter_model.safetensors")
    (told,) = one_rank.run(continued, tmp_path, options)
    assert isinstance(told, str) and told.startswith(f"peft.init_from={tmp_path}: ") and message in told
    if options:
        assert "its configuration says peft.target_modules=[down_proj,gate_proj,k_proj," in told
