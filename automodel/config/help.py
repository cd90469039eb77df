"""The text of ``--help``: groups, stable keys and examples, from the configuration tree itself."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from automodel.config.command_line import CONFIG_ROOT, config_groups
from automodel.config.schema import Config

_TOP = """python -m automodel.run [recipe=NAME] [group=option ...] [key=value ...]

Fine-tunes a language model. Without arguments: a small model on exercises made in code, in minutes on a CPU.
"""
_EXAMPLES = """Examples
  python -m automodel.run
  python -m automodel.run model=hf model.pretrained_model_name_or_path=DIR_OR_HUB_ID \\
      dataset=jsonl dataset.path=FILE.jsonl launch.nproc_per_node=2 distributed=fsdp2
  python -m automodel.run recipe=llm_seq_cls model=hf model.pretrained_model_name_or_path=DIR \\
      dataset=jsonl dataset.path=FILE.jsonl dataset.columns.text=sentence

Also: --cfg job (show the configuration), --config-dir DIR (your own groups), --config-path DIR --config-name config
(repeat a saved run), -m key=1,2 (a run for each value)."""
_WIDTH = 110


def help_text() -> str:
    """Return the help, a line for every group and stable key."""
    lines = [_TOP, "Groups: group=option"]
    for group, options in config_groups().items():
        lines.append(f"  {group}")
        lines += [_row(f"    {option}", _headline(CONFIG_ROOT / group / f"{option}.yaml")) for option in options]
    lines += ["", "Keys: key=value", *_fixed_keys(), *_group_keys(), "", _EXAMPLES]
    return "\n".join(lines)


def _fixed_keys() -> list[str]:
    defaults = yaml.safe_load((CONFIG_ROOT / "config.yaml").read_text())
    lines = []
    for name, field in Config.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        if inner is None and field.description:
            lines.append(_row(f"  {name}={_shown(defaults[name])}", field.description))
        elif inner is not None and name != "recipe":
            lines += [
                _row(f"  {name}.{key}={_shown(defaults[name][key])}", each.description or "")
                for key, each in inner.items()
            ]
    return lines


def _group_keys() -> list[str]:
    """The keys of the options of each group, with the comment behind them in their file."""
    seen: dict[str, str] = {}
    for group, options in config_groups().items():
        if group in ("recipe", "tuned", "experiment", "validation_dataset"):
            continue
        for option in options:
            for key, default, comment in _commented_keys(CONFIG_ROOT / group / f"{option}.yaml"):
                name = f"  {group}.{key}={default}"
                if name not in seen or comment:
                    seen[name] = comment or f"({group}={option})"
    return [_row(name, comment) for name, comment in seen.items()]


def _commented_keys(file: Path) -> list[tuple[str, str, str]]:
    found, parents = [], {}
    for line in file.read_text().splitlines():
        match = re.fullmatch(r"( *)([a-z][a-z_0-9]*):(?: +([^#]*?))?(?: +# (.*))?", line)
        if match is None:
            continue
        indent, key, default, comment = len(match[1]), match[2], (match[3] or "").strip(), match[4] or ""
        parents[indent] = key
        path = ".".join(parents[level] for level in sorted(parents) if level <= indent)
        if default:
            found.append((path, default, comment))
    return found


def _headline(file: Path) -> str:
    first = [line[2:] for line in file.read_text().splitlines() if line.startswith("# ") and "@package" not in line]
    return first[0] if first else ""


def _row(left: str, right: str) -> str:
    return f"{left:<50}  {right}"[:_WIDTH].rstrip()


def _shown(value: Any) -> str:
    return yaml.safe_dump(value).splitlines()[0] if value is not None else "null"
