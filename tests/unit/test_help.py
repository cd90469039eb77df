"""The help: whole words at any width, and each key with those of its own option."""

from __future__ import annotations

import re

import pytest
import yaml

from automodel.config import help_text
from automodel.config.groups import CONFIG_ROOT, config_groups, option_tree
from automodel.config.help import fixed_keys, option_keys
from automodel.config.names import leaf_keys


@pytest.fixture(params=["80", "110", "200"])
def columns(request, monkeypatch) -> int:
    monkeypatch.setenv("COLUMNS", request.param)
    return int(request.param)


def words(text: str) -> str:
    return " ".join(text.split())


def comment_of(file: str, key: str) -> str:
    (line,) = [each for each in (CONFIG_ROOT / file).read_text().splitlines() if re.match(rf" *{key}:", each)]
    return line.partition(" # ")[2]


def test_no_comment_is_cut_at_any_width(columns):
    text = help_text()
    for key in fixed_keys():
        assert words(key.comment) in words(text), key
    for group in ("dataset", "launch", "distributed", "peft", "model"):
        for option in config_groups()[group]:
            for key in option_keys(group, option):
                assert words(key.comment) in words(text), (group, option, key)
    assert [line for line in text.splitlines() if len(line) > min(120, columns)] == []


@pytest.mark.parametrize(
    ("argv", "file", "keys"),
    [
        ("dataset=hf", "dataset/hf.yaml", ("path", "name", "streaming")),
        ("dataset=jsonl", "dataset/jsonl.yaml", ("path", "on_bad_row")),
        ("launch=slurm", "launch/slurm.yaml", ("nodes", "mem", "job_name")),
        ("launch=kubernetes", "launch/kubernetes.yaml", ("nodes", "mem", "job_name")),
    ],
)
def test_an_option_is_shown_by_itself_with_its_own_words(argv, file, keys):
    text, group = help_text([argv, "--help"]), argv.partition("=")[0]
    assert text.startswith(argv)
    for key in keys:
        shown = re.search(rf"  {group}\.{key}=.*?(?=\n  {group}\.|\Z)", text, re.DOTALL)[0]
        assert words(shown).endswith(words(comment_of(file, key)))
    other = {"dataset": "launch", "launch": "dataset"}[group]
    assert f"{other}." not in text


def test_options_that_differ_are_told_apart_in_the_whole():
    text = words(help_text())
    assert "launch.mem=null [kubernetes] of each pod, such as 200Gi" in text
    assert "launch.mem=null [slurm] of each node, such as 200G" in text
    assert "dataset.path=??? [hf] OWNER/NAME on the hub" in text
    assert "dataset.path=??? [jsonl]" in text


def test_an_option_built_on_another_shows_all_its_keys():
    text = help_text(["peft=dora", "--help"])
    assert "peft.rank=16" in text and "peft.use_dora=true" in text and "peft.use_dora=false" not in text
    assert "validation_dataset.path=???" in help_text(["validation_dataset=jsonl", "--help"])


def test_every_key_has_words():
    """The comment behind a key in conf/ is its help text, the only one."""
    assert [key.name for key in fixed_keys() if not key.comment] == []
    tree = yaml.safe_load((CONFIG_ROOT / "config.yaml").read_text())
    leaves = {key for key in leaf_keys(tree) if not isinstance(tree.get(key), dict)}
    assert {key.name for key in fixed_keys()} == {key for key in leaves if not key.startswith(("defaults", "hydra"))}
    for group in ("dataset", "launch", "distributed", "peft", "model", "lr_scheduler", "evaluation"):
        for option in config_groups()[group]:
            shown = {key.name: key for key in option_keys(group, option)}
            for name in option_tree(group, option):
                if not name.startswith("_") and name != "config":
                    assert shown[f"{group}.{name}"].comment, f"conf/{group}/{option}.yaml: {name} has no comment"
