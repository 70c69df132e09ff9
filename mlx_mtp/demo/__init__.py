"""The built-in trained pairs: real, but tiny. README.md beside this is their model card."""

from pathlib import Path

_FOLDER = Path(__file__).parent

TARGET = _FOLDER / "edge"
MIXTURE_TARGET = _FOLDER / "mixture"
