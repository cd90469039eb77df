"""The console script ``automodel VERB ...``; ``python -m automodel.VERB`` is the same."""

from __future__ import annotations

import sys
from importlib import import_module

VERBS = {
    "run": "train, as a recipe and the configuration say",
    "preview": "show the rows as they would be trained on, and stop at what would train wrongly",
    "check_parity": "train a few steps in one process and in your layout, and compare",
    "verify_resume": "kill a run again and again, and compare it with a whole one",
    "export": "write a Hugging Face directory from a training checkpoint",
}


def main() -> None:
    """Hand the command line to the module of its verb."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("automodel VERB [key=value ...]\n\nVerbs")
        print("\n".join(f"  {verb:<16}{meaning}" for verb, meaning in VERBS.items()))
        return
    verb = sys.argv[1].replace("-", "_")
    if verb not in VERBS:
        from automodel.config.names import did_you_mean

        known = f"there are: {', '.join(VERBS)}{did_you_mean(verb, VERBS)}"
        print(f"error: {sys.argv[1]} is not a verb; {known}", file=sys.stderr)
        sys.exit(2)
    import_module(f"automodel.{verb}").main(sys.argv[2:])


if __name__ == "__main__":
    main()
