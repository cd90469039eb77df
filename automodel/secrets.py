"""Tell secrets by the keys they stand under and by their shapes, and take them out of what is written down."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
_WORD_END = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[-. ]+")
_SECRET_KEY = re.compile(
    r"(?:^|_)(?:(?:access|auth|api|bearer|hf|hub|git|github|gitlab|refresh|wandb)?token|pat|bearer|authorization|auth|"
    r"cookies?|credentials?|secret|passw(?:or)?d|passphrase|pwd|(?:api|access|private|secret|account|signing)_?keys?)"
    r"(?:_value)?$"
)
_SPECIAL_TOKEN = re.compile(r"(?:^|_)(?:eos|bos|pad|unk|sep|cls|mask|image|video|audio|special|start|end|stop)_token$")
_SHAPES = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)",
        r"\bhf_[A-Za-z0-9]{20,}",
        r"\bapi_org_[A-Za-z0-9]{20,}",
        r"\bgh[opsur]_[A-Za-z0-9]{20,}",
        r"\bgithub_pat_[A-Za-z0-9_]{20,}",
        r"\bglpat-[A-Za-z0-9_-]{16,}",
        r"(?<![A-Za-z0-9_-])sk-(?=[A-Za-z0-9_-]*\d)[A-Za-z0-9_-]{16,}",
        r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
        r"\bxox[a-z]-[A-Za-z0-9-]{10,}",
        r"\bwandb_v\d+_[A-Za-z0-9_-]{10,}",
        r"\bAIza[A-Za-z0-9_-]{35}",
        r"\b(?:gsk|npm|r8)_[A-Za-z0-9]{30,}",
        r"\b(?:nvapi|pypi)-[A-Za-z0-9_-]{20,}",
        r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*",
    )
]
_AFTER_WORD = [
    re.compile(r"(\b(?:Bearer|Basic)\s+)(?!\$\{)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE),
    re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://[^\s:/@'\"]*:)[^\s/@'\"]+(?=@)"),
    re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^\s:/@'\"]{20,}(?=@)"),
    re.compile(r"([?&](?:sig|X-Amz-(?:Signature|Credential|Security-Token))=)[^&\s'\"]+", re.IGNORECASE),
]
_VALUE = r"(?!['\"]?\$\{)(\"[^\"]*\"|'[^']*'|[^\s'\",}\])]+)"
_ARGUMENTS = [
    re.compile(rf"([A-Za-z0-9_.@-]+)(\\?['\"]?\s?=\s?){_VALUE}"),  # key=value
    re.compile(rf"(?<=[{{,'\"\s])([A-Za-z0-9_.-]+)(['\"]\s*:\s*|:\s?(?=\S+[,}}])){_VALUE}"),  # {{key: value}}
    re.compile(rf"--([A-Za-z0-9_.-]+)(\s+)(?!-){_VALUE}"),  # --key value
]
_LOST = re.compile(r"^\*{3}$|\b(?:Bearer|Basic) \*{3}|://[^\s/]*\*{3}@", re.IGNORECASE)
_SHORTEST_VALUE = 8
"""Shorter values of variables are words that may stand anywhere."""


def is_secret_key(key: str) -> bool:
    """Return whether what stands under ``key`` is a secret by the key's name."""
    name = _WORD_END.sub("_", key.lstrip("+~-")).lower()
    if key == "PWD":  # where a shell is
        return False
    return bool(_SECRET_KEY.search(name)) and not _SPECIAL_TOKEN.search(name)


def masked(value: Any, key: str = "", *, env: Mapping[str, str] = os.environ) -> Any:
    """Return plain data without its secrets.

    A value of a variable of ``env`` becomes a reference to it, which the configuration resolves when it is run again.
    """
    if isinstance(value, dict):
        return {name: masked(item, key if is_secret_key(key) else str(name), env=env) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, key, env=env) for item in value]
    if not is_secret_key(key):
        return masked_text(value, env=env) if isinstance(value, str) else value
    if value is None or isinstance(value, bool) or value == "":
        return value
    name = next((name for name, held in env.items() if held == str(value) and len(held) >= _SHORTEST_VALUE), None)
    return _reference(name) if name is not None else MASK


def masked_text(text: str, *, env: Mapping[str, str] = os.environ) -> str:
    """Return ``text``, such as a command line or a message, without the secrets in it."""
    for name, held in env.items():
        if len(held) >= _SHORTEST_VALUE and held in text and is_secret_key(name):
            text = text.replace(held, _reference(name))
    for shape in _SHAPES:
        text = shape.sub(MASK, text)
    for argument in _ARGUMENTS:
        text = argument.sub(_without_value, text)
    for word in _AFTER_WORD:
        text = word.sub(rf"\g<1>{MASK}", text)
    return text


def masked_keys(value: Any, key: str = "") -> list[str]:
    """Return the keys of plain data whose values hold a secret, in their order."""
    name = key.rpartition(".")[2]
    if isinstance(value, dict) and not is_secret_key(name):
        inside = ((f"{key}.{inner}" if key else str(inner), item) for inner, item in value.items())
        return [each for inner, item in inside for each in masked_keys(item, inner)]
    is_secret = masked(value, name) != (list(value) if isinstance(value, tuple) else value)
    return [key] if is_secret else []


def lost_keys(value: Any, key: str = "") -> list[str]:
    """Return the keys of plain data that was read again whose secrets were not written down."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else ((None, item) for item in value)
        inside = ((key if inner is None else f"{key}.{inner}" if key else str(inner), item) for inner, item in items)
        return list(dict.fromkeys(each for inner, item in inside for each in lost_keys(item, inner)))
    return [key] if isinstance(value, str) and _LOST.search(value) else []


def _without_value(found: re.Match[str]) -> str:
    key, between, value = found.groups()
    if not is_secret_key(key.rpartition(".")[2]) or value in (MASK, "null", "true", "false", "None"):
        return found[0]
    return found[0][: found.start(2) - found.start()] + between + MASK


def _reference(name: str) -> str:
    return f"${{oc.env:{name}}}"
