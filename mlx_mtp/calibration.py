"""What was measured on this machine, kept in the user's cache folder so that it is measured once.

One JSON file of keys and values. A key names all that the figures depend on (device, MLX version, shapes), so an entry
never has to be invalidated. The file is a cache: without it everything works, a little slower at the start.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.device import is_gpu

LOG = logging.getLogger(__name__)


def default_path() -> Path:
    """calibration.json in the user's cache folder; the folder is made when something is written."""
    from platformdirs import user_cache_path  # only those who calibrate pay for the import

    return user_cache_path("mlx_mtp") / "calibration.json"


def machine() -> str:
    """What every figure depends on: the device, MLX's version, and a CPU's preloaded BLAS with its settings."""
    from importlib.metadata import version  # it imports a mail parser: only those who calibrate pay for it

    names = ("LD_PRELOAD", "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "OPENBLAS_THREAD_TIMEOUT")
    blas = [] if is_gpu() else [os.environ.get(name, "") for name in names]
    parts = [str(mx.device_info().get("device_name", "unknown device")), mx.default_device().type.name,
             f"mlx {version('mlx')}", *blas]
    return ", ".join(part for part in parts if part)


class CalibrationFile:
    """Reads and writes one entry at a time. What is wrong with the file is warned of once, and never raised."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._has_warned = False

    def read(self, key: str) -> dict[str, Any] | None:
        """What was written under this key, or None."""
        value = self._entries().get(key)
        return value if isinstance(value, dict) else None

    def write(self, key: str, value: dict[str, Any]) -> None:
        """Adds or replaces one entry. A reader finds the old file or the new one, never half of it.

        value: what JSON can hold, with strings as keys.
        """
        text = json.dumps({**self._entries(), key: value}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.name}.")
        except OSError as error:
            self._warn(f"cannot be written ({error}); measuring again next time")
            return
        part = Path(name)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            part.replace(self.path)
        except OSError as error:
            part.unlink(missing_ok=True)
            self._warn(f"cannot be written ({error}); measuring again next time")

    def _entries(self) -> dict[str, Any]:
        try:
            entries = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:  # neither JSON nor UTF-8, or JSON far too deep
            self._warn(f"cannot be read ({error}); measuring anew")
            return {}
        if not isinstance(entries, dict):
            self._warn("is not a JSON object; measuring anew")
            return {}
        return entries

    def _warn(self, what: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            LOG.warning("%s %s", self.path, what)
