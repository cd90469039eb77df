"""The configuration: everything that is wrong is told at once, by name, before torch is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from automodel.config import Config, help_text, load_config, resolved_yaml
from automodel.config.groups import CONFIG_ROOT, config_groups
from automodel.types import UserError

ROOT = Path(__file__).parents[2]
JSONL = "dataset=jsonl dataset.path={rows}"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    return file


def problems_of(*argv: str, env: dict[str, str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_config(list(argv), env=env or {})
    return "\n".join(caught.value.problems)


WRONG = [
    ("step_scheduler.max_step=3", "step_scheduler.max_step is not a known key; did you mean step_scheduler.max_steps?"),
    ("max_steps=5", "did you mean step_scheduler.max_steps?"),
    ("lr=1e-4", "did you mean optimizer.lr?"),
    ("optimiser.lr=1", "did you mean optimizer.lr?"),
    ("optimizer.learning_rate=1", "optimizer.learning_rate is not an option of adamw; write optimizer.lr=1"),
    ("distribute=fsdp2", "did you mean distributed?"),
    ("distributed=fsdp", "distributed=fsdp: no such option; there are: ddp, fsdp2, megatron_fsdp; did you mean fsdp2?"),
    ("recipe=llm_sff", "did you mean llm_sft?"),
    ("modle=hf", "did you mean model"),
    ("logger=[jsonl,wandbb]", "logger=wandbb: no such option"),
    ("experiment=nope", "experiment=nope: no such option"),
    ("distributed.reshard_after_forward=false", "is not an option of DDP; distributed=fsdp2 has it"),
    ("distributed.dp_replicate_size=2", "distributed=fsdp2 has it"),
    ("distributed=fsdp2 distributed.dp_replicate_size=2", "distributed.dp_replicate_size=2 must divide"),
    ("distributed=fsdp2 distributed.tp_size=3", "distributed.tp_size=3 must divide the number of ranks, 1"),
    ("distributed=fsdp2 distributed.tp_size=0", "distributed.tp_size=0 must be at least 1"),
    ("distributed.tp_size=2", "distributed.tp_size is not an option of DDP; distributed=fsdp2 has it"),
    ("distributed.zero_stage=2", "distributed.zero_stage is not an option of DDP; distributed=megatron_fsdp has it"),
    ("distributed=fsdp2 distributed.sequence_parallel=true", "set distributed.tp_size"),
    ("distributed=megatron_fsdp distributed.zero_stage=4", "distributed.zero_stage=4 must be one of 1, 2 or 3"),
    ("distributed=megatron_fsdp distributed.shard_optimizer_over_replicas=true", "set distributed.dp_replicate_size"),
    ("dataset=jsonl dataset.path=[]", "dataset.path=[] names no file"),
    ("dataset=jsonl dataset.path=[none.jsonl]", "dataset.path=none.jsonl: there is no such file"),
    (f"{JSONL} dataset.validation_share=0", "dataset.validation_share=0 must be more than 0"),
    (f"{JSONL} dataset.validation_share=5%", "dataset.validation_share=5% must be a number"),
    (
        f"{JSONL} dataset.validation_share=0.1 validation_dataset=jsonl validation_dataset.path={{rows}}",
        "dataset.validation_share=0.1 and a validation_dataset: choose one of them",
    ),
    (f"{JSONL} dataset.validation_share=0.1 dataset.streaming=true", "does not go with dataset.streaming=true"),
    (
        f"{JSONL} validation_dataset=jsonl validation_dataset.path={{rows}} validation_dataset.validation_share=0.1",
        "validation_dataset.validation_share: dataset.validation_share sets aside rows of the training set",
    ),
    ("dataset=mixture dataset.sources.a.validation_share=0.1", "dataset.sources.a.validation_share: a mixture has"),
    ("peft=lora", "this model has fresh ones: choose model=hf"),
    ("peft=qlora", "peft=qlora: no such option; there are: dora, lora, none"),
    ("peft=lora peft.rank=0", "peft.rank=0 must be at least 1"),
    ("peft=lora peft.dropout=1.5", "peft.dropout=1.5 must be less than 1"),
    ("peft=dora distributed=fsdp2 distributed.tp_size=2 launch.nproc_per_node=2", "use peft=lora"),
    ("recipe=llm_dpo", "recipe=llm_dpo: no such option; there are: llm_seq_cls, llm_sft"),
    ("compile.enabled=true", "compile.enabled is not a known key"),
    ("packing.enabld=true", "packing.enabld is not a known key; did you mean packing.enabled?"),
    ("recipe=llm_seq_cls packing.enabled=true", "packing.enabled=true does not apply to recipe=llm_seq_cls"),
    ("packing.enabled=true dataloader.max_tokens_per_batch=9", "choose one; packs already have one length"),
    ("data_checks=off", "data_checks=off must be one of auto, strict or warn"),
    ("dataset=jsonl dataset.path=README.md dataset.streaming=true", "needs step_scheduler.max_steps"),
    (
        "dataset=jsonl dataset.path=README.md dataset.streaming=true step_scheduler.max_steps=1 "
        "dataloader.length_grouped=true",
        "dataloader.length_grouped does not go with dataset.streaming=true",
    ),
    ("dataset=jsonl dataset.path=README.md dataset.on_bad_row=drop", "dataset.on_bad_row=drop must be one of stop"),
    ("dataset=jsonl dataset.path=README.md dataset.num_proc=0", "dataset.num_proc=0 must be at least 1"),
    ("step_scheduler.max_steps=abc", "step_scheduler.max_steps=abc must be a whole number"),
    ("step_scheduler.max_steps=0", "step_scheduler.max_steps=0 must be at least 1"),
    ("step_scheduler.max_steps=true", "step_scheduler.max_steps=true must be a whole number"),
    ("step_scheduler.global_batch_size=1.5", "must be a whole number"),
    ("step_scheduler=5", "step_scheduler=5 must be a section of keys"),
    ("step_scheduler.max_steps=[1,2]", "must be a whole number"),
    ("rng.deterministic=1", "rng.deterministic=1 must be true or false"),
    ("rng.seed=-1", "rng.seed=-1 must be at least 0"),
    ("on_non_finite=stopp", "must be one of stop or skip; did you mean stop?"),
    ("model.dtype=float16", "must be one of auto, float32 or bfloat16"),
    ("model.dtype=float32 distributed.mixed_precision=pure_bf16", "trains bf16 weights, not model.dtype=float32"),
    ("peft=lora distributed.mixed_precision=pure_bf16", "adapters are trained in float32; choose bf16 with peft"),
    ("peft=lora model.dtype=bfloat16 distributed.mixed_precision=float32", "leave one of them at auto"),
    ("distributed=megatron_fsdp distributed.mixed_precision=pure_bf16", "must be one of auto, bf16 or float32"),
    ("dataset.truncation=rigth", "did you mean right?"),
    ("distributed.mixed_precision=fp8", "must be one of auto, bf16, float32 or pure_bf16"),
    ("dist_env.backend=ncll", "did you mean nccl?"),
    ("dist_env.timeout_minutes=0", "must be more than 0"),
    ("optimizer.lr=abc", "optimizer.lr=abc must be a number"),
    ("optimizer.lr=0", "optimizer.lr=0 must be more than 0"),
    ("optimizer.betas=[0.9]", "optimizer.betas=[0.9] must be a list of 2 items"),
    ("optimizer.betas=[0.9,1.5]", "optimizer.betas.1=1.5 must be less than 1"),
    ("optimizer._target_=no_such.Thing", "optimizer._target_=no_such.Thing: cannot be imported"),
    ("lr_scheduler.warmup_ratio=2", "must be at most 1"),
    ("lr_scheduler.min_lr_ratio=1.5", "lr_scheduler.min_lr_ratio=1.5 must be at most 1"),
    ("recipe._target_=no_such.run", "recipe._target_=no_such.run: cannot be imported"),
    ("recipe._target_=automodel.recipes.no_such.run", "automodel.recipes.no_such.run: cannot be imported"),
    ("recipe._target_=os.getcwd", "recipe._target_=os.getcwd must return automodel.runner.recipe.Recipe, not str"),
    ("launch._target_=no_such.Launch", "launch._target_=no_such.Launch: cannot be imported"),
    ("launch._target_=types.SimpleNamespace", "launch._target_=types.SimpleNamespace must be a class with a method"),
    ("model=scratch +model.config.x={_target_:no_such.X}", "model.config.x._target_=no_such.X: cannot be imported"),
    ("dataset=jsonl", "dataset.path is required"),
    ("dataset=jsonl dataset.path=no/such/file.jsonl", "there is no such file"),
    ("dataset=jsonl dataset.path=x dataset.columns.promt=q", "did you mean dataset.columns.prompt?"),
    ("model=hf", "model.pretrained_model_name_or_path is required"),
    ("model=hf model.pretrained_model_name_or_path=./no/such", "there is no such folder"),
    ("model=hf model.pretrained_model_name_or_path=conf", "the folder has no config.json"),
    ("validation_dataset=none validation_dataset.path=x", "nothing is chosen for validation_dataset"),
    ("validation_dataset=none step_scheduler.val_every_steps=5 evaluation=loss", "there is no validation_dataset"),
    ("validation_dataset=none", "evaluation=generation needs rows to answer"),
    ("recipe=llm_seq_cls evaluation=generation", "evaluation=generation does not apply to recipe=llm_seq_cls"),
    ("checkpoint.resume=no/such", "there is no such folder"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last=0 must be at least 1"),
    ("checkpoint.keep_best=loss", "checkpoint.keep_best=loss must be min:NAME or max:NAME"),
    ("checkpoint.keep_best=min:loss validation_dataset=none evaluation=loss", "needs a validation_dataset"),
    (
        "checkpoint.keep_best=min:loss step_scheduler.ckpt_every_steps=3 step_scheduler.val_every_steps=2",
        "step_scheduler.val_every_steps=2 must divide step_scheduler.ckpt_every_steps=3",
    ),
    ("checkpoint.on_error=stpo", "must be one of stop or continue; did you mean stop?"),
    ("+step_scheduler.foo=1", "step_scheduler.foo is not a known key"),
    ("+nothing=1", "nothing is not a known key"),
    ("+optimizer.lrr=1", "optimizer.lrr is not an option of adamw; did you mean lr?"),
    ("~step_scheduler.num_epochs", "step_scheduler.num_epochs is missing"),
    ("--optimizer.lr=3", "write optimizer.lr=3, without dashes"),
    ("--optimizer.lr 3", "without dashes"),
    ("--no-such-flag", "--no-such-flag is not an option"),
    ("step_scheduler.max_steps", "write key=value"),
    ("model.dtype={a", "cannot be read"),
    ("-m optimizer.lr=1,x", "optimizer.lr=x must be a number"),
    ("launch.nproc_per_node=0", "must be at least 1"),
    ("launch.nproc_per_node=3", "is not divisible by local_batch_size 32 x data-parallel size 3"),
    ("--config-name=nope", "there is no nope.yaml"),
    ("--config-dir=no/such/folder", "is not a folder"),
]  # fmt: skip


@pytest.mark.parametrize(("command_line", "message"), WRONG, ids=[line for line, _ in WRONG])
def test_a_wrong_command_line_is_told_what_is_wrong(command_line, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert message in problems_of(*command_line.split())


def test_all_problems_are_told_at_once():
    told = problems_of("max_steps=5", "distributed=fsdp", "rng.seed=x", "dataset=jsonl", "dataset.path=no/such")
    for part in ("max_steps", "distributed=fsdp", "rng.seed=x", "dataset.path=no/such"):
        assert part in told


def test_batch_sizes_that_do_not_divide_name_those_that_do(rows):
    told = problems_of(
        *JSONL.format(rows=rows).split(), "step_scheduler.global_batch_size=100", "step_scheduler.local_batch_size=8",
        env={"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"},
    )  # fmt: skip
    assert told == (
        "step_scheduler.global_batch_size=100 is not divisible by local_batch_size 8 x data-parallel size 4; "
        "use 96 or 128"
    )


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "RANK without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE without RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 in the environment is not below WORLD_SIZE=2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "must be whole numbers"),
    ],
)
def test_an_environment_that_contradicts_itself_is_told(env, message):
    assert message in problems_of(env=env)


def test_an_empty_file_and_a_folder_of_pickles_are_told(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "pytorch_model.bin").touch()
    told = problems_of(
        "dataset=jsonl", f"dataset.path={tmp_path}/empty.jsonl", "model=hf",
        f"model.pretrained_model_name_or_path={tmp_path}/model",
    )  # fmt: skip
    assert "is empty" in told
    assert "no *.safetensors weights (only pytorch_model.bin; pickled weights are not loaded" in told


REQUIRED = {
    "launch": {"kubernetes": ["launch.image=me/it", "launch.dry_run=true"]},
    "model": {"hf": ["model.pretrained_model_name_or_path=org/name"], "scratch": ["model.tokenizer_name_or_path=a/b"]},
    "dataset": {"jsonl": ["dataset.path=pyproject.toml"], "hf": ["dataset.path=org/name"]},
    "peft": {name: ["model=hf", "model.pretrained_model_name_or_path=a/b"] for name in ("lora", "dora")},
    "validation_dataset": {"jsonl": ["validation_dataset.path=pyproject.toml"], "hf": ["validation_dataset.path=a/b"]},
}


@pytest.mark.parametrize(("group", "option"), [(g, o) for g, options in config_groups().items() for o in options])
def test_every_option_of_every_group_composes(group, option, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert composed(group, option)


def composed(group: str, option: str) -> Config:
    value = f"[{option}]" if group == "logger" else option
    extra = ["evaluation=loss"] if (group, option) == ("validation_dataset", "none") else []
    return load_config([f"{group}={value}", *REQUIRED.get(group, {}).get(option, []), *extra], env={})


def keys_of(tree: dict, prefix: str = "") -> set[str]:
    """Return every key of a tree that has a value, but for Hydra's own ``_partial_``."""
    keys = set()
    for name, value in tree.items():
        is_table = isinstance(value, dict) and value
        keys |= keys_of(value, f"{prefix}{name}.") if is_table else {f"{prefix}{name}"} - {f"{prefix}_partial_"}
    return keys


def test_a_table_says_of_every_key_what_a_resumed_run_does_with_another_value(monkeypatch):
    from automodel.config.resume_policy import RULES

    monkeypatch.chdir(ROOT)
    keys = set()
    for group, options in config_groups().items():
        for option in options:
            keys |= keys_of(composed(group, option).model_dump(by_alias=True))
    tables = {rule.removesuffix("*") for rule in RULES if rule.endswith(".*")}
    missing = {key for key in keys - RULES.keys() if not any(f"{key}.".startswith(table) for table in tables)}
    assert not missing, f"add to automodel/config/resume_policy.py what a resume does with {sorted(missing)}"
    fixed = {rule for rule in RULES if not rule.endswith(".*")}
    assert fixed - keys == set(), "these rules are for keys that are no more"


@pytest.mark.parametrize("split", ["train[:200]", "train[10%:20%]", "train[-5:]", "train", "'train[:200]'"])
def test_a_slice_needs_no_quotes(rows, split):
    cfg = load_config([*JSONL.format(rows=rows).split(), f"dataset.split={split}"], env={})
    assert cfg.dataset["split"] == split.strip("'")


def test_a_slice_of_a_source_needs_no_quotes(rows):
    sources = [f"dataset.sources.a.path={rows}", "dataset.sources.a.split=train[50%:]"]
    assert load_config(["dataset=mixture", *sources], env={}).dataset["sources"]["a"]["split"] == "train[50%:]"


def test_rows_may_be_several_files_with_a_share_to_validate_on(rows):
    argv = ["dataset=jsonl", f"dataset.path=[{rows},{rows.parent}]", "dataset.validation_share=0.05"]
    cfg = load_config([*argv, "step_scheduler.val_every_steps=3", "evaluation=generation"], env={})
    assert cfg.dataset["path"] == [str(rows), str(rows.parent)] and cfg.validation_dataset is None


def test_folders_whose_rows_are_elsewhere_are_told_what_to_do(tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "rows.jsonl").write_text("{}\n")
    told = problems_of("dataset=jsonl", f"dataset.path={tmp_path}/data")
    assert f"folders below it have (train); name one of them, or all by a glob: {tmp_path}/data/**/*.jsonl" in told
    saved = tmp_path / "saved"
    saved.mkdir()
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
        (saved / name).write_text("{}")
    assert "a folder of Dataset.save_to_disk" in problems_of("dataset=jsonl", f"dataset.path={saved}")


def test_what_suits_the_demo_does_not_leak_into_a_real_run(rows):
    demo = load_config([], env={})
    assert (demo.step_scheduler.global_batch_size, demo.optimizer["lr"]) == (32, 2e-3)
    assert demo.evaluation and demo.validation_dataset
    real = load_config(
        [*JSONL.format(rows=rows).split(), "model=hf", "model.pretrained_model_name_or_path=a/b"], env={}
    )
    assert (real.step_scheduler.global_batch_size, real.step_scheduler.local_batch_size) == (8, 1)
    assert real.optimizer["lr"] == 1e-5
    assert real.evaluation is None and real.validation_dataset is None


def test_a_group_can_be_left_out():
    assert load_config(["~evaluation"], env={}).evaluation is None


def test_defaults_in_code_equal_those_in_yaml():
    """Options of our own targets may have defaults for use in Python; they must not drift from the YAML's."""
    import dataclasses
    import inspect

    checked = 0
    for file in sorted((ROOT / "conf").glob("*/*.yaml")):
        section = yaml.safe_load(file.read_text()) or {}
        section = section.get(file.stem, section) if file.parent.name == "logger" else section
        if "_target_" not in section or file.parent.name == "validation_dataset" or "-" in file.stem:
            continue
        module, _, name = section["_target_"].rpartition(".")
        target = getattr(import_module(module), name)
        for parameter in inspect.signature(target).parameters.values():
            key, default = parameter.name, parameter.default
            plain = not isinstance(default, dataclasses._HAS_DEFAULT_FACTORY_CLASS)
            if default is not parameter.empty and plain and section.get(key) != "???" and key != "config":
                yaml_value = section[key]
                assert (tuple(yaml_value) if isinstance(yaml_value, list) else yaml_value) == default, f"{file}: {key}"
                checked += 1
    assert checked > 40


def test_checking_imports_no_torch():
    code = (
        "import sys, json; from automodel.config import load_config, help_text; load_config([]); help_text();"
        "import automodel.run; heavy = ('torch', 'transformers', 'datasets');"
        "print(json.dumps([m for m in heavy if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_help_lists_every_group_and_the_stable_keys():
    text = help_text()
    for group in config_groups():
        assert f"\n  {group}\n" in text
    for key in ("step_scheduler.global_batch_size=8", "dist_env.backend=auto", "clip_grad_norm.max_norm=1.0",
                "optimizer.lr=1.0e-05", "dataset.columns.prompt=null", "launch.nproc_per_node=1"):  # fmt: skip
        assert key in text


def test_typos_in_a_users_own_yaml_are_told(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [config, _self_]\nstep_schedular: {max_steps: 3}\noptimiser: {lr: 1}\n"
    )
    told = problems_of("--config-dir", str(tmp_path), "--config-name", "mine")
    assert "step_schedular" in told and "optimiser" in told


def test_a_users_own_yaml_and_experiment_work(tmp_path):
    (tmp_path / "mine.yaml").write_text("defaults: [config, _self_]\nstep_scheduler: {max_steps: 3}\n")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "quick.yaml").write_text("# @package _global_\nstep_scheduler: {max_steps: 7}\n")
    assert load_config(["--config-dir", str(tmp_path), "--config-name", "mine"], env={}).step_scheduler.max_steps == 3
    argv = ["--config-dir", str(tmp_path), "experiment=quick"]
    assert load_config(argv, env={}).step_scheduler.max_steps == 7


def test_the_resolved_yaml_runs_again(tmp_path):
    plain = load_config(["step_scheduler.max_steps=3"], env={})
    (tmp_path / "config.yaml").write_text(resolved_yaml(plain))
    assert load_config(["--config-path", str(tmp_path), "--config-name", "config"], env={}) == plain
    told = problems_of("--config-path", str(tmp_path), "--config-name", "config", "distributed=fsdp2")
    assert "a saved configuration has no groups" in told


def test_a_users_own_target_is_checked_by_its_signature(tmp_path, monkeypatch):
    (tmp_path / "mine_optim.py").write_text("def build(params, *, lr, betas, eps, weight_decay=0.0, extra=1): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_config(["optimizer._target_=mine_optim.build", "+optimizer.extra=2"], env={})
    told = problems_of("optimizer._target_=mine_optim.build", "+optimizer.extar=2")
    assert "optimizer.extar is not an option of build; did you mean extra?" in told


PRETRAINED = ("model=hf", "model.pretrained_model_name_or_path=owner/name", "dataset=jsonl", "dataset.path=README.md")


def rate_and_batch(*argv: str) -> tuple[float, int]:
    config = load_config([*argv], env={})
    return config.optimizer["lr"], config.step_scheduler.global_batch_size


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], (1e-5, 8)),
        (["peft=lora"], (2e-4, 16)),
        (["peft=dora"], (2e-4, 16)),
        (["peft=lora", "recipe=llm_seq_cls"], (2e-4, 16)),
        (["optimizer=sgd"], (1e-3, 8)),
        (["peft=lora", "optimizer=sgd"], (2e-2, 16)),
        (["optimizer.lr=3e-5", "peft=lora"], (3e-5, 16)),
        (["peft=dora", "step_scheduler.global_batch_size=4"], (2e-4, 4)),
    ],
)
def test_rate_and_batch_fit_what_is_trained_unless_they_are_given(argv, expected):
    assert rate_and_batch(*PRETRAINED, *argv) == expected


def test_a_file_of_the_users_own_chooses_adapters_and_overrides_what_fits_them(tmp_path):
    (tmp_path / "experiment").mkdir()
    head = "# @package _global_\ndefaults:\n  - override /peft: lora\n"
    (tmp_path / "experiment" / "adapters.yaml").write_text(head)
    (tmp_path / "experiment" / "slow.yaml").write_text(f"{head}optimizer:\n  lr: 7.0e-06\n")
    (tmp_path / "mine.yaml").write_text(
        "defaults:\n  - config\n  - override peft: lora\n  - _self_\nstep_scheduler:\n  global_batch_size: 24\n"
    )
    folder = f"--config-dir={tmp_path}"
    assert rate_and_batch(folder, *PRETRAINED, "experiment=adapters") == (2e-4, 16)
    assert rate_and_batch(folder, *PRETRAINED, "experiment=slow") == (7e-6, 16)
    assert rate_and_batch(folder, "--config-name=mine", *PRETRAINED) == (2e-4, 24)


def test_what_suits_the_demo_alone_stays_with_it():
    assert rate_and_batch() == (2e-3, 32)
    assert rate_and_batch("dataset=jsonl", "dataset.path=README.md", "evaluation=loss") == (1e-5, 8)
    assert "tuned_peft" not in config_groups()


def test_help_shows_the_values_that_fit_adapters(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")  # a narrow screen would break the lines
    lines = help_text().splitlines()
    for file in CONFIG_ROOT.glob("tuned_peft/lora-*.yaml"):
        tuned = yaml.load(file.read_text(), Loader=yaml.BaseLoader)
        values = {f"{section}.{key}": value for section, keys in tuned.items() if section != "defaults"
                  for key, value in keys.items()}  # fmt: skip
        for key, value in values.items():
            assert any(f" {key}=" in line and f"with peft {value}" in line for line in lines), (key, value)
