"""What a user means although a group, an order or a name is not ours; all of it without torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from automodel.cli.command_line import load_one_config, read_own_keys
from automodel.config import load_command_line, load_config, resolved_yaml
from automodel.config.arguments import read_arguments
from automodel.config.command_line import compose_command_line, hydra_command_line
from automodel.config.foreign_names import SECTIONS, find_foreign
from automodel.config.groups import config_groups, shipped_keys
from automodel.config.migration_page import migration_page
from automodel.config.overrides import parse_overrides
from automodel.preview import Keys
from automodel.types import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """Be in a folder with rows, a model, and rows whose path needs quotes."""
    odd = tmp_path / "my data=v1, final [x]"
    odd.mkdir()
    for file in (tmp_path / "rows.jsonl", odd / "rows.jsonl"):
        file.write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / "model" / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems_of(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(list(argv), env={})
    return "\n".join(caught.value.problems)


CHOSEN = [
    (["dataset.path=rows.jsonl"], ["dataset=jsonl"]),
    (["dataset.path=owner/set", "dataset.name=main"], ["dataset=hf"]),
    (["dataset.path=./nope.csv.gz"], ["dataset=jsonl"]),
    (["dataset.sources.a.path=rows.jsonl"], ["dataset=mixture"]),
    (["dataset=rows.jsonl"], ["dataset=jsonl", "dataset.path='rows.jsonl'"]),
    (["dataset=owner/set"], ["dataset=hf", "dataset.path='owner/set'"]),
    (["model.pretrained_model_name_or_path=owner/name"], ["model=hf"]),
    (["model.tokenizer_name_or_path=owner/name"], ["model=scratch"]),
    (["model=model"], ["model=hf", "model.pretrained_model_name_or_path='model'"]),
    (["model=owner/name"], ["model=hf", "model.pretrained_model_name_or_path='owner/name'"]),
    (["validation_dataset.path=rows.jsonl"], ["validation_dataset=jsonl"]),
    (["validation_dataset=rows.jsonl"], ["validation_dataset=jsonl", "validation_dataset.path='rows.jsonl'"]),
    (["peft.rank=8"], ["peft=lora"]),
    (["peft.use_dora=true"], ["peft=lora"]),
    (["logger.wandb.project=mine"], ["logger=[jsonl,wandb]"]),
    (["dataset.path=my data=v1, final [x]/rows.jsonl"], ["dataset=jsonl"]),
]


@pytest.mark.parametrize(("argv", "chosen"), CHOSEN, ids=[" ".join(argv) for argv, _ in CHOSEN])
def test_a_forgotten_group_is_chosen_where_nothing_else_can_be_meant(here, argv, chosen):
    composed = compose_command_line(argv)
    assert set(chosen) <= set(composed.argv)
    assert composed.problems == []
    assert len(composed.notes) == 1


def test_what_is_chosen_is_told_recorded_and_passed_on(here, capsys):
    argv = ["model=model", "dataset.path=rows.jsonl", "validation_dataset=rows.jsonl", "evaluation.batch_size=3"]
    cfg, written_out = load_command_line([*argv, "peft.rank=8"], env={})
    told = capsys.readouterr().err
    for line in ("dataset=jsonl is chosen", "peft=lora is chosen for peft.rank", "evaluation=generation is chosen"):
        assert f"note: {line}" in told
    assert load_config(written_out, env={}) == cfg
    assert capsys.readouterr().err == "", "what is written out needs no note"
    record = yaml.safe_load(resolved_yaml(cfg))
    assert record["dataset"]["_target_"].endswith(".FileDataset") and record["dataset"]["path"] == "rows.jsonl"
    assert record["model"]["pretrained_model_name_or_path"] == "model" and record["peft"]["rank"] == 8
    load_config(argv, env={"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"})
    assert capsys.readouterr().err == "", "one rank speaks for all"


DOUBTFUL = [
    ("dataset=demo dataset.path=rows.jsonl", "dataset.path is not an option of DemoDataset; dataset=hf has it"),
    ("model=demo model.pretrained_model_name_or_path=a/b", "model=hf has it"),
    ("dataset.path=rows", "dataset.path=rows: there is no such file; write dataset=jsonl dataset.path=FILE"),
    ("dataset.columns.prompt=q", "nothing says where the rows are; add dataset=jsonl dataset.path=FILE"),
    ("peft=none peft.rank=8", "peft.rank: nothing is chosen for peft; add peft=dora|lora"),
    ("launch.nodes=2", "launch.nodes is not an option of LocalLaunch; launch=kubernetes has it, launch=slurm too"),
    ("launch.partition=gpu", "launch=slurm has it"),
    ("optimizer.momentum=0.9", "momentum is not an option of adamw; optimizer=muon has it, optimizer=sgd too"),
    ("model=gpt2", "one of the hub is model=hf model.pretrained_model_name_or_path=gpt2"),
    ("model=hff", "did you mean hf?"),
    ("experiment=mine.yaml", "a file is given by itself: mine.yaml"),
    ("rows.jsonl", "rows.jsonl: write dataset=rows.jsonl"),
    ("model", "model: write model=model"),
    ("optimizer.lr=1e-5,3e-5", "need -m; a text with a comma is written \"optimizer.lr='1e-5,3e-5'\""),
    ("clip_grad_norm.max_norm=None", "YAML writes null"),
    ("step_scheduler.max_steps=2.0", "must be a whole number; write 2"),
    ("learning_rate=1e-4", "learning_rate is not a known key; write optimizer.lr=1e-4"),
    ("training.learning_rate=1e-4", "write optimizer.lr=1e-4"),
    ("--learning_rate 1e-4", "--learning_rate 1e-4: there is no such option; write optimizer.lr=1e-4"),
    ("--learning-rate=-1", "write optimizer.lr=-1"),
    ("--bf16 --lora_r 8", "write peft=lora peft.rank=8"),
    ("lora_r=8", "write peft=lora peft.rank=8"),
    ("gradient_accumulation_steps=4", "rows per optimizer step: local_batch_size x ranks x accumulation steps"),
    ("load_in_4bit=true", "load_in_4bit is not a known key; write peft=qlora"),
    ("packing=true", "write packing.enabled=true"),
    ("val_set_size=0.1", "write dataset.validation_share=0.1"),
    ("model.torch_dtype=bfloat16", "write model.dtype=bfloat16"),
    ("packed_sequence.packed_sequence_size=2048", "write packing.enabled=true packing.max_length=2048"),
    ("--config-dir nope experiment=x max_step=4", "did you mean step_scheduler.max_steps?"),
    ("--config-dir", "--config-dir needs a value"),
    ("a.yaml b.yaml", "a.yaml and b.yaml: give one file"),
]  # fmt: skip


@pytest.mark.parametrize(("command_line", "message"), DOUBTFUL, ids=[line for line, _ in DOUBTFUL])
def test_what_cannot_be_chosen_is_told_with_the_right_words(here, command_line, message):
    assert message in problems_of(*command_line.split())


def test_flags_may_stand_anywhere(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "quick.yaml").write_text("# @package _global_\nstep_scheduler: {max_steps: 7}\n")
    flags, values = [f"--config-dir={tmp_path}"], ["experiment=quick", "rng.seed=1,2"]
    for argv in (
        [*flags, "-m", *values],
        ["-m", *values, "--config-dir", str(tmp_path)],
        [values[0], "-cd", str(tmp_path), values[1], "--multirun"],
    ):
        found = read_arguments(argv)
        assert (found.overrides, found.config_dir, found.is_sweep) == (values, str(tmp_path), True)
    composed = compose_command_line([values[0], *flags, values[1], "-m"])
    assert [tree["step_scheduler"]["max_steps"] for tree in composed.trees] == [7, 7]
    assert [tree["rng"]["seed"] for tree in composed.trees] == [1, 2]


def test_text_that_only_a_grammar_minds_is_taken_as_it_stands(here):
    texts = ["my data=v1, final [x]/rows.jsonl", "train[:200]", "~/runs", "a=b", "runs/new one"]
    problems: list[str] = []
    parsed = parse_overrides([f"output_dir={text}" for text in texts], problems, is_sweep=False)
    assert [override.value() for override in parsed] == texts and problems == []


class TestAFile:
    def write(self, folder: Path, text: str) -> str:
        (folder / "mine.yaml").write_text(text)
        return "mine.yaml"

    def test_is_run_with_what_differs_from_it(self, here):
        file = self.write(
            here, "model: owner/name\ndataset: {path: rows.jsonl}\noptimizer: {lr: 1e-5}\npeft: {rank: 4}\n"
        )
        cfg, argv = load_command_line([file, "peft.alpha=8", "optimizer.lr=3e-5"], env={})
        assert cfg.model["pretrained_model_name_or_path"] == "owner/name" and cfg.dataset["path"] == "rows.jsonl"
        assert (cfg.peft["rank"], cfg.peft["alpha"], cfg.optimizer["lr"]) == (4, 8, 3e-5)
        assert load_config(argv, env={}) == cfg

    def test_may_choose_options_in_its_defaults_or_by_a_word(self, here):
        text = "defaults:\n  - model: hf\n  - override /dataset: hf\n  - _self_\npeft: dora\nlogger: [jsonl, wandb]\n"
        values = "model: {pretrained_model_name_or_path: a/b}\ndataset: {path: a/b}\n"
        file = self.write(here, text + values)
        cfg = load_config(["--config", file], env={})
        assert (
            cfg.model["_target_"].endswith(".HFModel")
            and cfg.peft["use_dora"]
            and set(cfg.logger) == {"jsonl", "wandb"}
        )
        assert load_config([file, "peft=lora"], env={}).peft["use_dora"] is False, "the command line wins"

    def test_may_be_the_record_of_a_run(self, here):
        cfg = load_config(["step_scheduler.max_steps=3"], env={})
        (here / "run").mkdir()
        (here / "run" / "config.yaml").write_text(resolved_yaml(cfg))
        assert load_config(["run/config.yaml"], env={}) == cfg
        assert load_config(["run"], env={}) == cfg
        assert load_config(["run", "rng.seed=7"], env={}).rng.seed == 7

    def test_is_taken_by_every_verb(self, here):
        file = self.write(here, "step_scheduler: {max_steps: 7}\n")
        values, rest, problems = read_own_keys([file, "preview.num_rows=1"], "preview", Keys)
        assert load_one_config(rest, problems).step_scheduler.max_steps == 7 and values.num_rows == 1

    def test_is_what_hydra_shows_too(self, here):
        file = self.write(here, "step_scheduler: {max_steps: 7}\ndataset: {path: rows.jsonl}\n")
        argv = hydra_command_line([file, "--cfg", "job", "rng.seed=1"])
        assert argv == ["--cfg", "job", "+config_file=values", "dataset=jsonl", "rng.seed=1"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: 1\nrng:\n\tseed: 1\n", "mine.yaml:3:1: a tab; YAML takes spaces alone"),
            ("rng: {seed: 1}\nmodel: hf\nrng: {seed: 2}\n", "mine.yaml:3:1: the key rng is there twice"),
            ("rng:\n  seed: [1, 2\nmodel: hf\n", "mine.yaml:3:6: "),
            ("output_dir: a: b\n", "mine.yaml:1:14: mapping values are not allowed here"),
            ("- 1\n- 2\n", "mine.yaml: a configuration is made of lines key: value"),
            ("learning_rate: 1e-4\n", "learning_rate is not a known key; write optimizer.lr=0.0001"),
            ("optimizer: {lr: '1e-5'}\n", "optimizer.lr=1e-5 must be a number; it is text here: leave out the quotes"),
            ("checkpoint: {resume: no}\n", "YAML reads yes, no, on and off as true and false: put the word in quotes"),
            (
                "output_dir: ${oc.env:NO_SUCH}/x\n",
                "output_dir=${oc.env:NO_SUCH}/x: the environment variable NO_SUCH",
            ),
        ],
    )
    def test_with_a_mistake_is_told_where_it_is_with_all_else(self, here, text, message):
        told = problems_of(self.write(here, text), "on_non_finite=x")
        assert message in told and "on_non_finite=x" in told


def test_cases_of_users_experiments(shared_data, monkeypatch):
    folder = ["--config-dir", str(shared_data / "cases" / "config-exp")]
    monkeypatch.delenv("ROWS_DIR", raising=False)
    told = problems_of(*folder, "experiment=sci")
    assert "dataset.path=${oc.env:ROWS_DIR}/rows.jsonl: the environment variable ROWS_DIR is not set" in told
    assert "clip_grad_norm.max_norm=None must be a number; YAML writes null" in told
    told = problems_of(*folder, "experiment=strings").splitlines()
    assert len(told) == 4 and all(";" in line for line in told)
    monkeypatch.setenv("ROWS_DIR", str(shared_data / "cases" / "config-paths" / "my data=v1, final [x]"))
    cfg = load_config([*folder, "experiment=sci", "clip_grad_norm.max_norm=null", "dataset=jsonl"], env={})
    assert (cfg.optimizer["lr"], cfg.optimizer["eps"]) == (1e-5, 1e-6)
    assert cfg.dataset["path"].endswith("[x]/rows.jsonl")


def test_an_experiment_without_its_package_is_told(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "quick.yaml").write_text("step_scheduler: {max_steps: 7}\n")
    told = problems_of("experiment=quick", "--config-dir", str(tmp_path))
    assert "quick.yaml:1: the first line must be '# @package _global_'" in told


def test_every_name_of_another_tool_leads_to_a_key_that_there_is():
    keys, groups, seen = set(shipped_keys()), config_groups(), set()
    for each in (each for section in SECTIONS.values() for each in section):
        for name in each.names.split():
            assert name not in seen, f"{name} is there twice"
            seen.add(name)
            assert find_foreign(name) is each
        assert bool(each.ours) or bool(each.remark), each.names
        for written in each.ours.split():
            key, _, value = written.partition("=")
            assert key in keys or (key in groups and (value == "{}" or value in groups[key] or key == "logger")), (
                written
            )


def test_the_page_about_other_tools_is_that_of_the_table():
    assert (ROOT / "docs" / "migration.md").read_text() == migration_page(), (
        "write it again: python -m automodel.config.migration_page > docs/migration.md"
    )
