"""The text of ``--help``: the comments of the configuration tree, each beside the key that it belongs to."""

from __future__ import annotations

import re
import shutil
import textwrap
from typing import NamedTuple

from automodel.config.arguments import read_arguments
from automodel.config.groups import CONFIG_ROOT, bases, config_groups

_TOP = """python -m automodel.run [FILE.yaml] [group=option ...] [key=value ...]

Fine-tunes a language model. Without arguments: a small model on exercises made
in code, in minutes on a CPU.
"""
_EXAMPLES = """Examples
  python -m automodel.run
  python -m automodel.run model=DIR_OR_HUB_ID dataset=FILE.jsonl \\
      launch.nproc_per_node=2 distributed=fsdp2
  python -m automodel.run recipe=llm_seq_cls model=DIR_OR_HUB_ID \\
      dataset=FILE.jsonl dataset.columns.text=sentence

Also
  FILE.yaml, --config FILE.yaml     keys of yours in a file, or a run's folder
  --cfg job                         show the configuration and run nothing
  --config-dir DIR                  your own groups, as DIR/experiment/NAME.yaml
  -m key=1,2                        a run for each value
  group=option --help               the keys of one option"""
_HIDDEN = ("tuned", "tuned_optimizer", "recipe")
_LEFT = 44


class Key(NamedTuple):
    """A line of the tree: its dotted key, its default as written, and the comment behind it."""

    name: str
    default: str
    comment: str


def help_text(argv: list[str] | None = None) -> str:
    """Return the help: of everything, or of the options that the command line ``argv`` names beside ``--help``."""
    groups = config_groups()
    chosen = _chosen(argv or [], groups)
    if chosen:
        return "\n\n".join(_option_help(group, option) for group, option in chosen)
    lines = [_TOP, "Groups: group=option"]
    for group, options in groups.items():
        if group in ("tuned", "tuned_optimizer"):
            continue
        lines.append(f"  {group}")
        lines += [key_row(f"    {option}", headline(group, option), column=20) for option in options]
    lines += ["", "Keys: key=value"]
    lines += [key_row(f"  {key.name}={key.default}", key.comment) for key in fixed_keys()]
    for group, options in groups.items():
        if group not in _HIDDEN and group != "validation_dataset":
            lines += _group_rows(group, options)
    lines += ["  validation_dataset.*  as dataset.*", "", _EXAMPLES]
    return "\n".join(lines)


def fixed_keys() -> list[Key]:
    """Return the keys that every choice of options has."""
    text = (CONFIG_ROOT / "config.yaml").read_text()
    tree = text[text.index("\noutput_dir:") : text.index("\nhydra:")]
    return _commented(tree, "")


def option_keys(group: str, option: str) -> list[Key]:
    """Return the keys of an option, with those of the options that it is built on."""
    text = (CONFIG_ROOT / group / f"{option}.yaml").read_text()
    found = {key.name: key for base in bases(group, option) for key in option_keys(*base)}
    found = {name.replace(name.split(".")[0], group, 1): key for name, key in found.items()}
    found |= {key.name: key for key in _commented(text, f"{group}.") if not key.name.startswith(f"{group}.defaults")}
    return [key._replace(name=name) for name, key in found.items()]


def headline(group: str, option: str) -> str:
    """Return what the first comment of an option says of it; where it has none, that of the option it is built on."""
    lines = (CONFIG_ROOT / group / f"{option}.yaml").read_text().splitlines()
    first = [line[2:] for line in lines if line.startswith("# ") and "@package" not in line]
    return first[0] if first else next((headline(*base) for base in bases(group, option)), "")


def _chosen(argv: list[str], groups: dict[str, list[str]]) -> list[tuple[str, str]]:
    pairs = [line.lstrip("+").partition("=") for line in read_arguments(argv).overrides]
    return [
        (group, option)
        for group, _, options in pairs
        for option in options.strip("[]").split(",")
        if option in groups.get(group, ())
    ]


def _option_help(group: str, option: str) -> str:
    rows = [key_row(f"  {key.name}={key.default}", key.comment) for key in option_keys(group, option)]
    return "\n".join([f"{group}={option}", *_wrapped(headline(group, option), "  "), "", *rows])


def _group_rows(group: str, options: list[str]) -> list[str]:
    """Return a row for each key and meaning: where options differ, one for each, with the options that it is of."""
    of: dict[Key, list[str]] = {}
    for option in options:
        for key in option_keys(group, option):
            of.setdefault(key, []).append(option)
    with_keys = {option for found in of.values() for option in found}
    names = list(dict.fromkeys(key.name for key in of))
    rows = []
    for key, found in sorted(of.items(), key=lambda item: names.index(item[0].name)):
        which = "" if set(found) == with_keys and len(with_keys) > 1 else f"[{', '.join(found)}] "
        rows.append(key_row(f"  {key.name}={key.default}", f"{which}{key.comment}".rstrip()))
    return rows


def _commented(text: str, prefix: str) -> list[Key]:
    found, parents = [], {}
    for line in text.splitlines():
        match = re.fullmatch(r"( *)([a-z][a-z_0-9]*):(?: +([^#]*?))?(?: +# (.*))?", line)
        if match is None:
            continue
        indent, name, default, comment = len(match[1]), match[2], (match[3] or "").strip(), match[4] or ""
        parents = {level: parent for level, parent in parents.items() if level < indent} | {indent: name}
        if default or comment:
            found.append(Key(prefix + ".".join(parents.values()), default or "{...}", comment))
    return found


def key_row(left: str, right: str, *, column: int | None = None) -> str:
    """Return a key and its words, wrapped to the width of the screen and never cut."""
    column = column or min(_LEFT, _width() // 2)
    if not right:
        return left
    words = _wrapped(right, " " * column)
    if len(left) > column - 2:
        return "\n".join([left, *words])
    return "\n".join([left.ljust(column) + words[0].lstrip(), *words[1:]])


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, _width(), initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _width() -> int:
    return max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
