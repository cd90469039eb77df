"""Imports go one way, and what the configuration looks at needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]

# A row may import rows below it, never above, nor its own neighbours.
ROWS = (
    {"run", "preview", "check_parity", "verify_resume", "export", "__main__"},
    {"recipes"},
    {"cli", "proofs"},
    {"runner"},
    {"train"},
    {"tasks"},
    {"eval"},
    {"data", "models", "losses", "optim", "generation", "hf_export", "loggers"},
    {"checkpoint", "runs"},
    {"distributed", "launch"},
    {"config", "environment", "processes", "types", "logs", "screen", "secrets"},
)
BASE = ROWS[-1]


def module_files() -> list[Path]:
    return sorted([*(ROOT / "automodel").rglob("*.py"), *(ROOT / "recipes").glob("*.py")])


def package_of(file: Path) -> str:
    if file.is_relative_to(ROOT / "recipes"):
        return "recipes"
    return file.relative_to(ROOT / "automodel").parts[0].removesuffix(".py")


def row_of(package: str) -> int:
    return next(index for index, row in enumerate(ROWS) if package in row)


def imported_packages(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found |= {name.split(".")[1] for name in names if name.startswith("automodel.")}
    return found


@pytest.mark.parametrize("file", module_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_down(file):
    package = package_of(file)
    if package == "__init__":
        return
    for other in imported_packages(file) - {package, "conf"}:
        if package in BASE:
            assert other in BASE, f"{file} imports {other}"
        else:
            assert row_of(other) > row_of(package), f"{file} imports {other}, which is not below {package}"


def test_recipes_import_no_other_recipe():
    for file in (ROOT / "recipes").glob("llm_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("automodel.recipes"):
                assert node.module.rpartition(".")[2] in ("assembly", "summary", "training_data"), file


def test_every_target_of_the_configuration_imports_without_torch():
    targets = set()
    for file in (ROOT / "conf").glob("*/*.yaml"):
        text = yaml.safe_load(file.read_text()) or {}
        sections = [text, *(value for value in text.values() if isinstance(value, dict))]
        if file.parent.name != "recipe":
            targets |= {section["_target_"].rpartition(".")[0] for section in sections if "_target_" in section}
    assert len(targets) > 8
    code = (
        f"import importlib, sys\nfor name in {sorted(targets)}: importlib.import_module(name)\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_wheel_holds_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [file.parent for top in ("automodel", "recipes", "conf") for file in (ROOT / top).rglob("__init__.py")]
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    expected = {name if name.startswith("automodel") else f"automodel.{name}" for name in names}
    assert set(settings["packages"]) == expected
    assert not (ROOT / "automodel" / "conf").exists() and not (ROOT / "automodel" / "recipes").exists()


def test_every_yaml_of_the_tree_is_packaged():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    files = {file for pattern in patterns["automodel.conf"] for file in (ROOT / "conf").glob(pattern)}
    assert files == set((ROOT / "conf").rglob("*.yaml"))
