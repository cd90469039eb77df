"""What the docs quote from a file is in that file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXTENSIONS = ROOT / "tests" / "recipes" / "extensions"
BLOCK = re.compile(r"```\w+\n# (\S+\.(?:py|yaml))\n(.*?)```", re.DOTALL)
QUOTES = BLOCK.findall((ROOT / "docs" / "extending.md").read_text())


def test_the_guide_quotes_code():
    assert len(QUOTES) >= 8


@pytest.mark.parametrize(("name", "code"), QUOTES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(QUOTES)])
def test_quoted_code_is_in_its_file(name, code):
    assert code in (EXTENSIONS / name).read_text()
