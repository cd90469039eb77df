"""automodel: fine-tuning recipes for language models, configured in YAML."""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout `conf/` and `recipes/` are next to this package, not in it: make them importable as
# `automodel.conf` and `automodel.recipes` without an installation, as the wheel installs them.
_package_dir = Path(__file__).parent
if not (_package_dir / "conf").is_dir():
    __path__.append(str(_package_dir.parent))
