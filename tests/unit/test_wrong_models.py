"""A model that is none, names of modules that there are none of, and limits: each told by what it is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from automodel.config import load_config
from automodel.models.adapters import LoRA, described, merge_problem
from automodel.tasks.causal_lm import CausalLM
from automodel.types import UserError


def problems_of(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(list(argv), env={})
    return "\n".join(caught.value.problems)


def make(folder: Path, *names: str, base: str | None = None) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"base_model_name_or_path": base}) if "adapter" in name else "{}")
    return folder


FOLDERS = [
    (["adapter_config.json", "adapter_model.safetensors"], "is an adapter and no whole model: its base is owner/base"),
    (["run.json", "model/config.json"], "is the folder of a run; its model is {folder}/model"),
    (
        ["run.json", "model/adapter_config.json"],
        "the folder of a run, whose model is an adapter and no whole model: its",
    ),
    (
        ["run.json"],
        "a run that has no model yet; python -m automodel.export {folder}/checkpoints/latest OUT writes one",
    ),
    (["manifest.json", "__0_0.distcp"], "is a training checkpoint: write a model from it, python -m automodel.export"),
    (["step_00000005/manifest.json"], "python -m automodel.export {folder}/step_00000005 OUT, and give OUT"),
    (["model.gguf"], "a folder of GGUF files"),
    (["snapshots/abc/config.json"], "the folder has no config.json; {folder}/snapshots/abc has one"),
]


@pytest.mark.parametrize(("files", "message"), FOLDERS, ids=[files[0] for files, _ in FOLDERS])
def test_a_folder_that_is_no_model_is_told_by_what_it_is(tmp_path, files, message):
    folder = make(tmp_path / "it", *files, base="owner/base")
    assert message.format(folder=folder) in problems_of(f"model={folder}")


def test_flash_attention_that_is_not_installed_is_told_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("automodel.models.checks.find_spec", lambda name: None)
    told = problems_of("model=owner/name", "model.attn_implementation=flash_attention_2")
    assert "needs a GPU and the package flash-attn (or kernels), which is not installed" in told
    monkeypatch.setattr("automodel.models.checks.find_spec", lambda name: name == "flash_attn")
    assert load_config(["model=owner/name", "model.attn_implementation=flash_attention_2"], env={})


def test_flash_attention_without_a_gpu_is_told_before_the_rows_are_read():
    import torch

    from automodel.runner.job import Job

    cfg = SimpleNamespace(model={"attn_implementation": "flash_attention_2"})
    with pytest.raises(UserError, match="flash_attention_2 needs a GPU, and this run has none; choose sdpa"):
        Job(cfg, SimpleNamespace(device=torch.device("cpu")))


def tiny(kind: str, **more: object):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**sizes, **more}))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["q_proj", "v_porj"],
            "the model has no module v_porj; its linear ones, nearest first: v_proj",
        ),
        (["query_key_value"], "nearest first: "),
        ("q_proj", "peft.target_modules=q_proj is one pattern of whole names, which none has; write it as a list"),
        (".*attn[.]query", "the model has no module .*attn[.]query"),
    ],
    ids=str,
)
def test_a_name_that_is_no_modules_is_told_with_those_that_are(names, message):
    with pytest.raises(UserError) as caught:
        LoRA(target_modules=names).apply(tiny("llama"), task=CausalLM())
    told = str(caught.value)
    assert message in told
    if "nearest first" in told:
        offered = set(re.split(", |: ", told.split("nearest first: ")[1]))
        assert offered == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}


def test_names_and_patterns_that_are_there_are_taken():
    for names in ("all-linear", ["q_proj", "mlp.up_proj"], r".*\.(q|v)_proj"):
        assert LoRA(target_modules=names).apply(tiny("llama"), task=CausalLM())


def test_what_gets_no_adapter_is_said():
    experts = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    model = LoRA().apply(tiny("qwen2_moe", **experts), task=CausalLM())
    told = described(model)
    adapted, _, rest = told.partition("; without one, frozen: ")
    assert "q_proj" in adapted and "down_proj" in adapted
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in ("gate_up_proj", "gate"):
        has_adapter = any(f".{part}.lora_A" in name or f".{part}.base_layer" in name for name in trained)
        assert (f"mlp.experts.{part}" in rest or f"experts.{part}" in rest or f"mlp.{part}" in rest) != has_adapter
    assert "without one" in told and "embed" not in told
    assert described(LoRA().apply(tiny("llama"), task=CausalLM())).endswith("without one, frozen: lm_head")


def test_an_adapter_on_a_tied_output_layer_is_said_not_to_merge():
    tied = tiny("llama", tie_word_embeddings=True)
    problem = merge_problem(LoRA(target_modules=["q_proj", "lm_head"]).apply(tied, task=CausalLM()))
    assert problem is not None and "export.merge=true" in problem
    for names, model in ((["q_proj"], tiny("llama", tie_word_embeddings=True)), (["lm_head"], tiny("llama"))):
        assert merge_problem(LoRA(target_modules=names).apply(model, task=CausalLM())) is None


@pytest.mark.parametrize(
    ("model_max_length", "words"), [(8, "the model's limit of 8 tokens"), (None, "dataset.max_length=9")]
)
def test_what_bounds_the_length_of_a_row_is_named(tmp_path, model_max_length, words):
    from automodel.data.sources import FileDataset
    from automodel.models.char_tokenizer import build_char_tokenizer
    from tests.unit.rows import load_sft

    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "a" * 30, "completion": "b"}) + "\n")
    for truncation, prefix in (("error", "more than "), ("right", "nothing supervised is left within ")):
        source = FileDataset(path=str(rows), max_length=9, truncation=truncation)
        with pytest.raises(UserError, match=re.escape(prefix + words)):
            load_sft(source, build_char_tokenizer(), model_max_length=model_max_length)


def test_a_tokenizer_without_an_eos_is_told_what_to_do():
    from automodel.data.chat.encode import require_eos

    with pytest.raises(UserError, match=r"the tokenizer of some/where has no eos .* eos_token in its tokenizer_config"):
        require_eos(SimpleNamespace(eos_token_id=None, name_or_path="some/where"))
