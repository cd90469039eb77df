"""Generation stops where training taught the answers to end, in the run and in what it exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.recipes.command import command_line, records, run


@pytest.fixture
def base_model(shared_data: Path, tmp_path: Path) -> Path:
    """A fresh model whose own end is that of a document; its template ends turns with another token."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "templates" / "tok_minimind")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = None
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_answers_learnt_by_heart_are_right_where_the_base_names_another_end(base_model, shared_data, tmp_path):
    rows = shared_data / "cases" / "eos-of-template" / "rows.jsonl"
    output = run(
        "model=hf", f"model.pretrained_model_name_or_path={base_model}", "dataset=jsonl", f"dataset.path={rows}",
        "validation_dataset=jsonl", f"validation_dataset.path={rows}", "data_checks=warn", "optimizer.lr=1e-2",
        "evaluation=generation", "evaluation.max_new_tokens=16", "step_scheduler.num_epochs=50",
        "step_scheduler.local_batch_size=8", "step_scheduler.val_every_steps=null", f"output_dir={tmp_path}/run",
    )  # fmt: skip
    assert output.count("generation stops at <|im_end|>") == 1
    (last,) = records(tmp_path / "run", "validation")[-1:]
    assert last["metric/exact_match"] == 1.0
    (checkpoint, *_) = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    command_line(str(checkpoint), str(tmp_path / "exported"), "export.verify=false", verb="export")
    for folder in (tmp_path / "run" / "model", tmp_path / "exported"):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
