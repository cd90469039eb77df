"""A pretrained model that is sharded before it is loaded is the one that every rank would have loaded whole."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft  # noqa: F401 - so that the ranks need not import it
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from automodel.distributed.parallel.fsdp2 import FSDP2
from automodel.models.adapters import LoRA
from automodel.models.hf import HFModel, ScratchModel
from automodel.models.sharded_loading import unfilled_model
from automodel.tasks.causal_lm import CausalLM
from automodel.tasks.sequence_classification import SequenceClassification
from automodel.types import UserError
from tests.dist.pool import RankPool
from tests.dist.tiny import cpu_info

TOKENIZER: Any = SimpleNamespace(pad_token_id=0, bos_token_id=1, eos_token_id=2)
SIZES = {
    "vocab_size": 49, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2_SIZES = {"vocab_size": 49, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}


def save(folder: Path, model_type: str, *, dtype: str = "float32", max_shard_size: str = "5GB", **config: Any) -> Path:
    """Write a model whose every weight is random, also those that begin at 0 or 1."""
    torch.manual_seed(0)
    sizes = GPT2_SIZES if model_type == "gpt2" else SIZES
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **sizes | config), dtype=getattr(torch, dtype)
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def change(folder: Path, edit: Any) -> Path:
    """Rewrite the weight file of ``folder`` as ``edit`` leaves its weights."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def build_both(source: Any, strategy: FSDP2, adapters: LoRA | None, task: Any) -> tuple[nn.Module, nn.Module]:
    """Return the model loaded whole and then sharded, and the model sharded and then filled."""
    info = cpu_info()
    mesh = strategy.build_mesh(info)
    torch.manual_seed(7)
    whole = source.build(TOKENIZER, task=task)
    whole = whole if adapters is None else adapters.apply(whole, task=task)
    drawn = torch.get_rng_state()
    whole = strategy.parallelize(whole, dist_info=info, mesh=mesh)

    unfilled = unfilled_model(source, TOKENIZER, task=task, adapters=adapters)
    assert unfilled is not None
    torch.manual_seed(7)
    filled = unfilled.adapted(adapters, task=task)
    assert torch.equal(drawn, torch.get_rng_state())
    filled = strategy.parallelize(filled, dist_info=info, mesh=mesh)
    unfilled.fill(filled, strategy.device_of_shards(info))
    return whole, filled


def differences(folder: Path, dtype: str, strategy: FSDP2, adapters: LoRA | None, task: Any = None) -> list[str]:
    """Return the names of what is not the same to the last bit; then train both a little and compare the losses."""
    whole, filled = build_both(HFModel(str(folder), dtype=dtype), strategy, adapters, task or CausalLM())
    found = [] if tensors(whole).keys() == tensors(filled).keys() else ["names"]
    for name, expected in tensors(whole).items():
        got = tensors(filled)[name]
        is_same = got.requires_grad == expected.requires_grad
        if isinstance(expected, DTensor):
            is_same &= got.placements == expected.placements and got.shape == expected.shape
            expected, got = expected.to_local(), got.to_local()
        is_same &= got.dtype == expected.dtype and got.device == expected.device
        found += [] if is_same and torch.equal(got, expected) else [name]
    found += [] if ties(whole) == ties(filled) else ["ties"]
    found += [] if whole.config.to_dict() == filled.config.to_dict() else ["config"]
    found += [] if whole.training == filled.training else ["training"]
    return found + ([] if losses(whole) == losses(filled) else ["losses"])


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def ties(model: nn.Module) -> set[tuple[str, ...]]:
    names: dict[int, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)] = (*names.get(id(parameter), ()), name)
    return {each for each in names.values() if len(each) > 1}


def losses(model: nn.Module) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for _ in range(2):
        loss = model(input_ids=torch.arange(8).reshape(1, 8), use_cache=False).logits.float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("held", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "mistral", "phi3", "olmo2"]
)
def test_every_weight_and_buffer_is_that_of_from_pretrained(two_ranks, tmp_path, model_type, held, wanted):
    folder = save(tmp_path, model_type, dtype=held, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert two_ranks.run(differences, folder, wanted, FSDP2(), None) == [[], []]


@pytest.mark.parametrize("adapters", [None, LoRA(rank=2)], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("world", "strategy"),
    [
        (2, FSDP2(mixed_precision="bf16", cpu_offload=True)),
        (2, FSDP2(activation_checkpointing=True)),
        (4, FSDP2()),
        (4, FSDP2(dp_replicate_size=2)),
        (4, FSDP2(tp_size=2)),  # whose 49 tokens no two ranks share evenly
    ],
    ids=["bf16 offload", "checkpointing", "4 ranks", "hsdp", "tp"],
)
def test_every_layout_is_filled_alike(ranks, tmp_path, world, strategy, adapters):
    folder = save(tmp_path, "llama", tie_word_embeddings=True)
    assert ranks[world].run(differences, folder, "float32", strategy, adapters) == [[]] * world


@pytest.mark.parametrize(
    "adapters",
    [
        LoRA(rank=2),
        LoRA(rank=2, use_rslora=True, modules_to_save=["lm_head"]),
        LoRA(rank=2, target_modules=["embed_tokens"]),
        LoRA(rank=2, init_lora_weights="gaussian"),
        LoRA(rank=2, init_lora_weights="orthogonal"),
    ],
    ids=["lora", "with a copied module", "on the embeddings", "gaussian", "orthogonal"],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_begin_with_the_same_numbers(two_ranks, tmp_path, dtype, adapters):
    folder = save(tmp_path, "qwen2")
    assert two_ranks.run(differences, folder, dtype, FSDP2(), adapters) == [[], []]


@pytest.mark.parametrize("adapters", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_a_trained_classifier_is_filled_with_its_head(two_ranks, tmp_path, adapters):
    config = AutoConfig.for_model("llama", **SIZES, num_labels=3)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    assert two_ranks.run(
        differences, tmp_path, "float32", FSDP2(), adapters, SequenceClassification(("a", "b", "c"))
    ) == [[], []]


def test_files_without_the_models_prefix_are_filled(two_ranks, tmp_path):
    def shorten(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)
        weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # which files of that age hold, and the model computes

    folder = change(save(tmp_path, "gpt2"), shorten)
    assert two_ranks.run(differences, folder, "float32", FSDP2(), None) == [[], []]


def told(source: Any, task: Any = None, adapters: Any = None) -> str:
    """Return the error of preparing, or what the log says, or nothing where shards are to be filled."""
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("automodel")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        unfilled = unfilled_model(source, TOKENIZER, task=task or CausalLM(), adapters=adapters)
    except UserError as error:
        return "; ".join(error.problems)
    finally:
        logger.removeHandler(handler)
    assert unfilled is None
    return "".join(lines)


def told_by_loading(source: HFModel) -> str:
    with pytest.raises(UserError) as caught:
        source.build(TOKENIZER, task=CausalLM())
    return "; ".join(caught.value.problems)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda weights: weights.pop("model.norm.weight"), "missing from the checkpoint, such as model.norm.weight"),
        (lambda weights: weights.update(extra=torch.ones(1)), "unknown to the model, such as extra"),
        (
            lambda weights: weights.update({"model.norm.weight": torch.ones(17)}),
            "another shape, such as model.norm.weight: [17] in the checkpoint, [16] in the model",
        ),
    ],
    ids=["missing", "unexpected", "misshaped"],
)
def test_weights_without_a_partner_are_refused_in_the_same_words(two_ranks, tmp_path, edit, expected):
    source = HFModel(str(change(save(tmp_path, "llama"), edit)))
    for words in two_ranks.run(told, source):
        assert expected in words and words == told_by_loading(source)


class OwnModel(HFModel):
    """A user's class, whose ``build`` may do anything."""


def both_of_a_tie(folder: Path) -> Path:
    return change(
        save(folder, "gemma2"),
        lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"] + 1}),
    )


def quantized(folder: Path) -> Path:
    config = json.loads((save(folder, "llama") / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            lambda folder: (HFModel(str(save(folder, "llama"))), SequenceClassification(("a", "b"))),
            "score.weight is not in the files",
        ),
        (lambda folder: (HFModel(str(save(folder, "llama"))), None, LoRA(use_dora=True)), "DoRA begins with"),
        (
            lambda folder: (HFModel(str(save(folder, "llama"))), None, LoRA(init_lora_weights="pissa")),
            "peft.init_lora_weights=pissa begins with factors of whole weights",
        ),
        (
            lambda folder: (
                HFModel(str(save(folder, "llama"))),
                None,
                LoRA(init_from="x", modules_to_save=["lm_head"]),
            ),
            "peft.init_from brings modules that are trained whole",
        ),
        (lambda folder: (HFModel(str(save(folder, "mixtral"))),), "converts the weights of MixtralForCausalLM"),
        (lambda folder: (HFModel(str(both_of_a_tie(folder))),), "hold a tied weight twice"),
        (lambda folder: (HFModel(str(quantized(folder))),), "quantization_config"),
        (lambda folder: (HFModel(str(folder / "nothing")),), "Error: "),
        (lambda folder: (OwnModel(str(save(folder, "llama"))),), "OwnModel does with the weights is not known"),
    ],
    ids=[
        "new head",
        "dora",
        "pissa",
        "another adapter",
        "fused",
        "both of a tie",
        "quantized",
        "no folder",
        "a class of one's own",
    ],
)
def test_what_cannot_be_filled_exactly_is_loaded_whole(two_ranks, tmp_path, make, expected):
    for words in two_ranks.run(told, *make(tmp_path)):
        assert words.startswith("every rank loads the whole model") and expected in words


def test_of_a_fresh_model_nothing_is_said(two_ranks):
    assert two_ranks.run(told, ScratchModel()) == ["", ""]


def told_where_ranks_differ(good: Path, other: Path) -> str:
    return told(HFModel(str(other if dist.get_rank() == 1 else good)))


def test_all_ranks_load_the_whole_where_one_must(two_ranks, tmp_path):
    good, fused = save(tmp_path / "good", "llama"), save(tmp_path / "fused", "mixtral")
    first, second = two_ranks.run(told_where_ranks_differ, good, fused)
    assert first == second and "MixtralForCausalLM" in first


def peak_bytes(folder: Path) -> int:
    """Return by how much the anonymous memory of this rank grew at most while its shards were filled."""
    peak, is_done = 0, threading.Event()

    def held() -> int:
        return 1024 * int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0])

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.001):
            peak = max(peak, held())

    strategy, info = FSDP2(), cpu_info()
    mesh = strategy.build_mesh(info)
    before = held()
    watcher = threading.Thread(target=watch)
    watcher.start()
    unfilled = unfilled_model(HFModel(str(folder)), TOKENIZER, task=CausalLM(), adapters=None)
    assert unfilled is not None
    model = strategy.parallelize(unfilled.adapted(None, task=CausalLM()), dist_info=info, mesh=mesh)
    time.sleep(0.01)
    unfilled.fill(model, torch.device("cpu"))
    time.sleep(0.01)
    is_done.set()
    watcher.join()
    return max(peak, held()) - before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell the memory of a process")
def test_no_rank_ever_holds_the_whole_model(tmp_path):
    folder = save(tmp_path, "llama", dtype="bfloat16", hidden_size=512, intermediate_size=1024, vocab_size=8192)
    num_bytes = 2 * (folder / "model.safetensors").stat().st_size  # it is read in bf16 and held in float32
    pool = RankPool(4)  # of its own, whose memory no other test has filled
    pool.run(differences, save(tmp_path / "tiny", "llama"), "float32", FSDP2(), None)  # what is imported by then stays
    for peak in pool.run(peak_bytes, folder):
        assert peak < 0.6 * num_bytes  # a quarter, and a slice of the largest weight as it is read and rounded
    pool.close()
