"""``python -m automodel.run``: train as a recipe and the configuration say."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from automodel.config.arguments import DRY_BUILD, has_help


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv`` (default: this process's) and exit with the run's status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    words = [word for word in argv if word != DRY_BUILD]
    if has_help(words):
        from automodel.config.help import help_text

        print(help_text(words))
        return
    from automodel.cli.start import start  # its imports take longer than the help

    start(words, is_dry=DRY_BUILD in argv)


if __name__ == "__main__":
    main()
