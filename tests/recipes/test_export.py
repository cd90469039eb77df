"""Any checkpoint becomes a Hugging Face directory, and none that is wrong gets its name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from automodel.export import main
from automodel.models.char_tokenizer import build_char_tokenizer
from tests.recipes.command import ROOT, command_line, run

SCRATCH = ["model=scratch", "model.config.hidden_size=32", "model.config.intermediate_size=64",
           "model.config.num_hidden_layers=2", "model.config.num_attention_heads=4"]  # fmt: skip
TWO = ["launch.nproc_per_node=2", "distributed=fsdp2"]
RUNS = {
    "tied": [*SCRATCH, "+model.config.tie_word_embeddings=true"],
    "untied, fsdp2": [*SCRATCH, "+model.config.tie_word_embeddings=false", *TWO],
    "tied, tensor parallel": [*SCRATCH, "+model.config.tie_word_embeddings=true", *TWO, "distributed.tp_size=2"],
    "classifier": ["recipe=llm_seq_cls", *SCRATCH],
    "lora": ["model=hf", "peft=lora", "peft.modules_to_save=[lm_head]", *TWO],
    "dora": ["model=hf", "peft=dora"],
}
STRANGER = """
import json, os, sys, torch, transformers
from peft import PeftModel
def load(folder, base, task):
    auto = getattr(transformers, "AutoModelFor" + task)
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        return PeftModel.from_pretrained(auto.from_pretrained(base), folder).eval()
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()
for line in sys.stdin:
    expected, got, base, task = json.loads(line)
    tokens = torch.arange(3, 27).reshape(2, 12)
    with torch.no_grad():
        one, other = (load(folder, base, task)(input_ids=tokens).logits.float() for folder in (expected, got))
    tokenizers = [transformers.AutoTokenizer.from_pretrained(folder) for folder in (got, base)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert tokenizers[0].chat_template == tokenizers[1].chat_template != None
    assert not any(name.startswith("automodel") for name in sys.modules)
    print(float((one - other).norm() / one.norm()), flush=True)
"""
"""A process without any of our code: it says how far the logits of two folders are apart."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A pretrained model, as far as anyone can tell, with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    tokenizer = build_char_tokenizer()
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def runs(base: Path, tmp_path_factory) -> Callable[[str], Path]:
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = folder / str(len(made))
            source = (
                "model.pretrained_model_name_or_path" if "model=hf" in RUNS[name] else "model.tokenizer_name_or_path"
            )
            run(
                *RUNS[name], f"{source}={base}", "dataset=demo", "dataset.limit=64", "validation_dataset=none",
                "step_scheduler.max_steps=3", "step_scheduler.global_batch_size=16", "optimizer.lr=1e-2",
                "step_scheduler.local_batch_size=8", f"output_dir={made[name]}",
                *([] if name == "classifier" else ["~evaluation"]),
            )  # fmt: skip
        return made[name]

    return get


def export(*argv: object) -> int:
    with pytest.raises(SystemExit) as left:
        main([str(arg) for arg in argv])
    return left.value.code


@pytest.fixture(scope="module")
def difference(base, tmp_path_factory) -> Callable[..., float]:
    """Return how far apart the logits of two folders are, relative to their norm, loaded without our code."""
    process = subprocess.Popen(
        [sys.executable, "-c", STRANGER],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(expected: Path, got: Path, task: str = "CausalLM") -> float:
        print(json.dumps([str(expected), str(got), str(base), task]), file=process.stdin, flush=True)
        return float(process.stdout.readline())

    yield ask
    process.stdin.close()
    assert process.wait() == 0


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("name", ["tied", "untied, fsdp2", "tied, tensor parallel", "classifier"])
def test_a_checkpoint_of_any_layout_exports_to_the_model_of_its_run(runs, difference, tmp_path, name):
    folder, out = runs(name), tmp_path / "out"
    assert export(folder / "checkpoints" / "latest", out, "export.max_shard_size=20KB") == 0
    task = "SequenceClassification" if name == "classifier" else "CausalLM"
    assert difference(folder / "model", out, task) < 1e-6
    index = json.loads((out / "model.safetensors.index.json").read_text())
    written, expected = tensors(out), tensors(folder / "model")
    assert len(set(index["weight_map"].values())) > 2 and index["weight_map"].keys() == written.keys()
    assert max(path.stat().st_size for path in out.glob("*.safetensors")) < 22_000  # with the header
    assert ("lm_head.weight" in written) == (name == "untied, fsdp2")
    assert written.keys() == expected.keys() and all(torch.equal(written[key], expected[key]) for key in expected)
    for file in ("config.json", "generation_config.json"):
        if (folder / "model" / file).exists():
            assert json.loads((out / file).read_text()) == json.loads((folder / "model" / file).read_text())


def test_the_dtype_is_the_one_asked_for(runs, difference, tmp_path):
    folder, out = runs("tied"), tmp_path / "out"
    command_line(str(folder / "checkpoints" / "latest"), str(out), "export.dtype=bfloat16", verb="export")
    written, expected = tensors(out), tensors(folder / "model")
    assert all(torch.equal(written[key], expected[key].to(torch.bfloat16)) for key in expected)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert difference(folder / "model", out) < 3e-2  # bf16 keeps three digits


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_adapters_export_as_such_and_merged(runs, base, difference, tmp_path, name):
    folder = runs(name)
    checkpoint = folder / "checkpoints" / "latest"
    assert export(checkpoint, tmp_path / "adapter") == 0
    assert difference(folder / "model", tmp_path / "adapter") < 1e-6
    assert difference(base, tmp_path / "adapter") > 1e-2  # the adapter does something
    assert export(checkpoint, tmp_path / "merged", "export.merge=true", "export.max_shard_size=20KB") == 0
    assert difference(folder / "model", tmp_path / "merged") < 1e-5  # weights added in another order
    is_apart = "lm_head.weight" in tensors(tmp_path / "merged")
    assert is_apart == (name == "lora")  # its head alone was trained, and is tied no more
    assert (tmp_path / "merged" / "model.safetensors.index.json").is_file()


def corrupted(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight * 1.5 if name.endswith("1.mlp.up_proj.weight") else weight for name, weight in weights.items()}


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("1.mlp.up_proj", "1.mlp.over_proj"): weight for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (corrupted, ["1 weights of the written model are not the trained ones: model.layers.1.mlp.up_proj.weight"]),
        (
            renamed,
            ["missing from the files: model.layers.1.mlp.up_proj", "unknown to the model in the files: model.lay"],
        ),
    ],
)
def test_an_export_that_is_not_the_model_is_kept_under_a_name_that_says_so(
    runs, tmp_path, monkeypatch, capsys, fault, told
):
    from automodel.hf_export import weight_files

    save = weight_files.save_file
    monkeypatch.setattr(weight_files, "save_file", lambda weights, *args, **named: save(fault(weights), *args, **named))
    checkpoint = runs("tied") / "checkpoints" / "latest"
    assert export(checkpoint, tmp_path / "out") == 1
    words = capsys.readouterr().err
    assert all(each in words for each in [*told, f"{tmp_path / 'out'} was not written"])
    assert f"kept unverified in {tmp_path / 'out.unverified'}; " in words
    assert [path.name for path in tmp_path.iterdir()] == ["out.unverified"]
    assert (tmp_path / "out.unverified" / "tokenizer.json").is_file()
    assert export(checkpoint, tmp_path / "out", "export.verify=false") == 0


def test_the_export_at_the_end_of_a_run_is_verified_too(tmp_path, monkeypatch, base):
    from transformers import AutoModelForCausalLM

    from automodel.distributed.parallel.handle import PlainHandle
    from automodel.hf_export import write as end_of_run
    from automodel.hf_export.verification import ExportError

    model = AutoModelForCausalLM.from_pretrained(base)
    monkeypatch.setattr(end_of_run, "run_on_main", lambda action: action())
    whole_weights = PlainHandle.whole_weights
    monkeypatch.setattr(PlainHandle, "whole_weights", lambda *args, **named: corrupted(whole_weights(*args, **named)))
    monkeypatch.setattr(end_of_run, "run_on_all_ranks", lambda action: action())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "earlier").touch()
    for name in ("model.unverified", "model.unverified.2"):
        with pytest.raises(ExportError, match=rf"does not compute .* kept unverified in \S*/{name}$"):
            end_of_run.export_model(model, build_char_tokenizer(), folder=tmp_path / "model")
        assert (tmp_path / name / "model.safetensors").is_file() and (tmp_path / "model" / "earlier").exists()
    end_of_run.export_model(model, build_char_tokenizer(), folder=tmp_path / "model", must_verify=False)
    assert (tmp_path / "model" / "config.json").is_file()


FAULTY = "tests.recipes.faulty_models"
HALF_PRECISION_ATTENTION = [
    "model=hf", f"model._target_={FAULTY}.HalfPrecisionAttention", "model.attn_implementation=half_precision_only",
    "distributed.mixed_precision=bf16", "dataset=demo", "dataset.limit=32", "step_scheduler.max_steps=1",
    "validation_dataset=demo", "validation_dataset.limit=2", "evaluation=generation", "evaluation.max_new_tokens=2",
]  # fmt: skip


@pytest.mark.parametrize("peft", ["none", "lora"])
def test_a_run_with_an_attention_of_a_device_alone_ends_with_its_model(base, difference, tmp_path, peft):
    run(
        *HALF_PRECISION_ATTENTION,
        f"peft={peft}",
        f"model.pretrained_model_name_or_path={base}",
        f"output_dir={tmp_path / 'run'}",
    )
    model, out = tmp_path / "run" / "model", tmp_path / "out"
    assert "half_precision_only" not in "".join(path.read_text() for path in model.glob("*.json"))
    assert export(tmp_path / "run" / "checkpoints" / "latest", out, "export.trust_remote_code=true") == 0
    assert difference(model, out) < 1e-6  # both load without it


WRONG = {
    "nothing": ([], "give the checkpoint and the folder to write"),
    "no checkpoint": (["{run}/checkpoints/step_00000009", "{out}"], "step_00000009; there are: {run}/{step}"),
    "a run directory": (["{run}", "{out}"], "whose newest checkpoint is {run}/{step}"),
    "no run": (["{alone}/{step}", "{out}"], "belongs to, but there is none"),
    "unfinished": (["{broken}/checkpoints/unfinished", "{out}"], "no manifest.json: the save was not finished"),
    "damaged": (["{broken}/checkpoints/damaged", "{out}"], "__0_0.distcp is damaged: its checksum differs"),
    "short": (["{broken}/checkpoints/short", "{out}"], "__0_0.distcp has 100 bytes instead of"),
    "another model": (["{other}/{step}", "{out}"], "18 weights of the model are missing from it: "),
    "a full folder": (["{last}", "{run}"], "{run} exists and is not empty"),
    "a file": (["{last}", "{run}/run.json"], "{run}/run.json is a file"),
    "dtype": (["{last}", "{out}", "export.dtype=bfloat"], "float32, bfloat16 or float16; did you mean bfloat16?"),
    "merge": (["{last}", "{out}", "export.merge=true"], "export.merge=true: the run in {run} trained no adapters"),
    "size": (["{last}", "{out}", "export.max_shard_size=big"], "export.max_shard_size=big must be a size such as"),
    "key": (["{last}", "{out}", "export.dtyp=float32"], "export.dtyp is not a known key; did you mean export.dtype?"),
    "bool": (["{last}", "{out}", "export.verify=maybe"], "export.verify=maybe must be true or false"),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(runs, tmp_path_factory) -> dict[str, Any]:
    folder, good = tmp_path_factory.mktemp("wrong"), runs("tied")
    (step,) = (good / "checkpoints").glob("step_*")
    shutil.copytree(step, folder / "alone" / "checkpoints" / step.name)
    for name in ("unfinished", "damaged", "short"):
        shutil.copytree(step, folder / "broken" / "checkpoints" / name)
    (folder / "broken" / "checkpoints" / "unfinished" / "manifest.json").unlink()
    data = (step / "__0_0.distcp").read_bytes()
    middle = len(data) // 2
    damaged = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    (folder / "broken" / "checkpoints" / "damaged" / "__0_0.distcp").write_bytes(damaged)
    (folder / "broken" / "checkpoints" / "short" / "__0_0.distcp").write_bytes(data[:100])
    shutil.copytree(good, folder / "other", symlinks=True)
    config = folder / "other" / "config.yaml"
    config.write_text(config.read_text().replace("num_hidden_layers: 2", "num_hidden_layers: 4"))
    return {
        "run": good,
        "alone": folder / "alone",
        "broken": folder / "broken",
        "other": folder / "other",
        "last": good / "checkpoints" / "latest",
        "step": f"checkpoints/{step.name}",
    }


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_in_words(places, tmp_path, capsys, name):
    argv, words = WRONG[name]
    assert export(*(arg.format(out=tmp_path / "out", **places) for arg in argv)) == 2
    told = capsys.readouterr().err
    assert words.format(out=tmp_path / "out", **places) in told and told.startswith("error: ")
    assert "Traceback" not in told and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"_target_": "os.system", "command": "touch executed"}, "model._target_=os.system"),
        ({"_target_": "automodel.models.demo.dataclass"}, "model._target_=automodel.models.demo.dataclass"),
        (
            {"config": {"model_type": {"_target_": "os.system", "command": "touch executed"}}},
            "model.config.model_type._target_=os.system",
        ),
        ({"trust_remote_code": True}, "model.trust_remote_code=true"),
    ],
)
def test_code_that_somebody_elses_run_names_is_not_run(runs, tmp_path, monkeypatch, capsys, changes, told):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(runs("tied"), tmp_path / "run", symlinks=True)
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    config["model"] |= changes
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    assert export("run/checkpoints/latest", "out") == 2
    words = capsys.readouterr().err
    assert f"config.yaml: {told} runs code that is not automodel's own" in words
    assert "export.trust_remote_code=true" in words and not (tmp_path / "executed").exists()
    if "trust_remote_code" in changes:
        assert export("run/checkpoints/latest", "out", "export.trust_remote_code=true") == 0


def test_every_problem_of_a_command_line_is_told_at_once(places, tmp_path, capsys):
    assert export("nowhere", places["run"], "export.dtype=x", "export.merge=2") == 2
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_help_needs_no_torch():
    code = "import sys; from automodel.export import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "export.max_shard_size" in done.stdout and done.stdout.strip().endswith("False")
