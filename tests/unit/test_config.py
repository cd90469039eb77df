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
    "peft": {name: ["model=hf", "model.pretrained_model_name_or_path=a/b"] for name in ("lora", "dora", "qlora")},
    "validation_dataset": {"jsonl": ["validation_dataset.path=pyproject.toml"], "hf": ["validation_dataset.path=a/b"]},
}


@pytest.mark.parametrize(("group", "option"), [(g, o) for g, options in config_groups().items() for o in options])
def test_every_option_of_every_group_composes(group, option, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert composed(group, option)


@pytest.fixture(autouse=True)
def with_every_package(monkeypatch):
    """Have qlora and adamw_8bit composed without bitsandbytes, which has no use on a CPU."""
    monkeypatch.setattr("automodel.models.adapter_checks.find_spec", lambda name: name)
    monkeypatch.setattr("automodel.optim.optimizers.find_spec", lambda name: name)


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
        "import automodel.cli.start; heavy = ('torch', 'transformers', 'datasets');"
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
        (["peft=qlora"], (2e-4, 16)),
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
