"""The page about moving over from other tools: ``python -m automodel.config.migration_page > docs/migration.md``."""

from __future__ import annotations

from automodel.config.foreign_names import SECTIONS

_TOOLS = {
    "T": "TRL and transformers",
    "A": "axolotl",
    "L": "LLaMA-Factory",
    "U": "torchtune",
    "N": "NeMo Automodel",
}


def migration_page() -> str:
    """Return the page about moving over from other tools, as Markdown."""
    lines = [
        "# Coming from another tool",
        "",
        "What the keys of other tools are called here. A command line or a file that holds one of them is refused, and",
        "the message says the same as this page. `...` is your value.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {letter} | {tool} |" for letter, tool in _TOOLS.items()),
    ]
    for title, section in SECTIONS.items():
        lines += ["", f"## {title}", "", "| there | in | here | |", "|---|---|---|---|"]
        for each in section:
            names = ", ".join(f"`{name}`" for name in each.names.split())
            ours = f"`{each.ours.replace('{}', '...')}`" if each.ours else "-"
            lines.append(f"| {names} | {' '.join(each.tools)} | {ours} | {each.remark} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(migration_page(), end="")
