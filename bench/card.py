"""The environment card: what a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx


def environment_card() -> dict[str, str]:
    """Machine, backend, BLAS and versions, as text."""
    device = mx.default_device()
    info = mx.device_info()
    return {
        "machine": f"{info.get('device_name', platform.processor())}, {os.cpu_count()} cores, {platform.system()} "
                   f"{platform.machine()}",
        "backend": f"MLX {version('mlx')} on {device.type.name}",
        "blas": _blas() if platform.system() == "Linux" and device.type == mx.DeviceType.cpu else "MLX's own",
        "python": platform.python_version(),
        "mlx-lm": version("mlx-lm"),
    }


def _blas() -> str:
    """Which BLAS this process has mapped: MLX's Linux wheel links the reference one, unless another is preloaded."""
    maps = Path("/proc/self/maps")
    return "OpenBLAS, preloaded" if maps.exists() and "openblas" in maps.read_text() else "reference"
