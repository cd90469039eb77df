"""Words that usually mark a sentence which a reader must decode are not in docs, comments, docstrings and messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTEAD = {
    r"alike": "both, each",
    r"anew": "again",
    r"told|tells? (of|that)": "reported, shown, named",
    r"(go|goes|going) on": "continues, resumes",
    r"in words(?!\[)": "(leave it out)",
    r"has its way": "decides, happens",
    r"whatever": "any, on any number of",
    r"(take|takes) up": "uses, starts",
    r"(look|looks|looked|looking) at": "checks, reads, see",
    r"so that none": "so no",
    r"stands? (in|at|for|beside|behind)": "is in, is at, means",
    r"of (its|his|one's) own accord": "by itself",
}
FLAGGED = re.compile("|".join(rf"\b(?:{words})\b" for words in INSTEAD), re.IGNORECASE)
GENERATED = {"docs/migration.md"}
FILES = sorted(
    str(file.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "automodel/**/*.py", "recipes/*.py", "conf/**/*.yaml", "Makefile")
    for file in ROOT.glob(pattern)
    if str(file.relative_to(ROOT)) not in GENERATED
)


@pytest.mark.parametrize("name", FILES)
def test_words_that_a_reader_must_decode_are_not_used(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [f"{name}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if FLAGGED.search(line)]
    assert not found, "write it otherwise (see INSTEAD):\n" + "\n".join(found)


def test_the_words_are_found_where_they_are():
    assert FLAGGED.search("# What is told goes on") and not FLAGGED.search("a foretold alike_name ongoing")
