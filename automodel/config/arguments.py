"""The words of a command line: flags, a file and ``key=value``, in any order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from automodel.config.names import did_you_mean
from automodel.config.paths import ROW_SUFFIXES

_WITH_VALUE = {
    "--config": "file",
    "--config-path": "config_path", "-cp": "config_path",
    "--config-name": "config_name", "-cn": "config_name",
    "--config-dir": "config_dir", "-cd": "config_dir",
}  # fmt: skip
_HELP = ("-h", "--help")
_SWEEP = ("-m", "--multirun")
_SHOW_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--info", "-i")
_SHOW = ("--resolve", "--hydra-help", "--version", "--shell-completion", "-sc")
_INFO_KINDS = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
DRY_BUILD = "--dry-build"
"""Taken by ``automodel.run`` itself: everything is built up to the first step, and nothing is written."""
_ALL = (DRY_BUILD, *_WITH_VALUE, *_HELP, *_SWEEP, *_SHOW_WITH_VALUE, *_SHOW)


@dataclass(frozen=True)
class DashedKey:
    """A key in the style of other tools: ``--a.b=3``, ``--learning_rate 1e-4``."""

    text: str
    key: str
    value: str | None


@dataclass
class Arguments:
    """A command line by its parts.

    Attributes:
        overrides: ``key=value`` and the like, as they were given.
        file: a configuration that is run as it is.
        show: flags of Hydra's own, which print something and run nothing.
        problems: a line each.
    """

    overrides: list[str] = field(default_factory=list)
    file: str | None = None
    config_path: str | None = None
    config_name: str | None = None
    config_dir: str | None = None
    show: list[str] = field(default_factory=list)
    is_sweep: bool = False
    wants_help: bool = False
    dashed: list[DashedKey] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def flags(self) -> list[str]:
        """Return the flags that say where the configuration is, as a command line has them."""
        named = {
            "--config": self.file, "--config-path": self.config_path,
            "--config-name": self.config_name, "--config-dir": self.config_dir,
        }  # fmt: skip
        return [word for flag, value in named.items() if value is not None for word in (flag, value)]


def has_help(argv: list[str]) -> bool:
    """Return whether our help is requested."""
    return read_arguments(argv).wants_help


def hydra_flags(argv: list[str]) -> bool:
    """Return whether the command line asks for something that Hydra itself must do."""
    return bool(read_arguments(argv).show)


def read_arguments(argv: list[str], *, is_key: Callable[[str], bool] = lambda name: False) -> Arguments:
    """Return the parts of ``argv``.

    Args:
        is_key: whether a name without dots is a key, here or in another tool, so that its dashes are too many.
    """
    found, words = Arguments(), list(argv)
    while words:
        word = words.pop(0)
        flag, has_value, value = word.partition("=")
        if flag in _WITH_VALUE:
            _set(found, flag, value if has_value else _take(words))
        elif word in _HELP:
            found.wants_help = True
        elif word in _SWEEP:
            found.is_sweep = True
        elif flag in _SHOW_WITH_VALUE:
            found.show += [flag, *([value] if has_value else _take_shown(flag, words))]
        elif word in _SHOW:
            found.show.append(word)
        elif word in ("--run", "-r"):
            continue  # what happens anyway
        elif word.startswith("-"):
            _read_dashed(found, word, words, is_key)
        elif "=" in word or word.startswith("~"):
            found.overrides.append(word)
        else:
            _read_bare(found, word)
    return found


def _take(words: list[str]) -> str | None:
    """Take the value of a flag, or return None where there is none."""
    return words.pop(0) if words and not words[0].startswith("-") else None


def _take_shown(flag: str, words: list[str]) -> list[str]:
    """Take the value of one of Hydra's flags; that of ``--info`` may be left out."""
    if flag in ("--info", "-i") and (not words or words[0] not in _INFO_KINDS):
        return []
    value = _take(words)
    return [] if value is None else [value]


def _set(found: Arguments, flag: str, value: str | None) -> None:
    name = _WITH_VALUE[flag]
    if not value:
        found.problems.append(f"{flag} needs a value: {flag} {'FILE.yaml' if name == 'file' else 'VALUE'}")
    elif name == "file":
        _set_file(found, value)
    else:
        setattr(found, name, value)


def _read_dashed(found: Arguments, word: str, words: list[str], is_key: Callable[[str], bool]) -> None:
    name, has_value, value = word.partition("=")
    key = name.lstrip("-").replace("-", "_")
    if not has_value and "." not in key and not is_key(key):
        hint = did_you_mean(name, _ALL) or "; keys are written as key=value, without dashes"
        found.problems.append(f"{word} is not an option{hint}")
        return
    if not has_value and words and "=" not in words[0] and not _is_flag(words[0]):
        value = words.pop(0)
        word, has_value = f"{word} {value}", "="
    found.dashed.append(DashedKey(word, key, value if has_value else None))


def _is_flag(word: str) -> bool:
    """Negative numbers are values."""
    return word.startswith("-") and not word[1:2].isdecimal()


def _read_bare(found: Arguments, word: str) -> None:
    path = Path(word).expanduser()
    if word.endswith((".yaml", ".yml")):
        _set_file(found, word)
    elif path.is_dir() and (path / "config.yaml").is_file():
        _set_file(found, str(Path(word) / "config.yaml"))
    elif path.is_dir() and (path / "config.json").is_file():
        found.problems.append(f"{word}: write model={word}")
    elif word.removesuffix(".gz").endswith(ROW_SUFFIXES):
        found.problems.append(f"{word}: write dataset={word}")
    else:
        found.problems.append(f"{word}: write key=value")


def _set_file(found: Arguments, path: str) -> None:
    if found.file is not None:
        found.problems.append(f"{found.file} and {path}: give one file, and what differs from it as key=value")
    else:
        found.file = path
