"""What a check ran on: device, versions, checkpoint."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx

from mlx_mtp.api import Pair
from mlx_mtp.checkpoint.hub import local_folder

SAMPLE = 2**20  # bytes at either end of a weight file that its fingerprint covers


def card(pair: Pair, model: str | None) -> dict[str, str]:
    """Device, versions, checkpoint and the type of its activations, each in one line."""
    device, info = mx.default_device(), mx.device_info()
    chip = info.get("device_name") or platform.processor() or platform.machine()
    checkpoint = "the built-in pair" if model is None else f"{model}, {fingerprint(local_folder(model))}"
    return {
        "device": f"{chip} ({device.type.name}), {platform.system()} {platform.machine()}",
        "versions": f"mlx-mtp {version('mlx-mtp')}, MLX {version('mlx')}, Python {platform.python_version()}",
        "checkpoint": checkpoint,
        "dtype": str(pair.target.dtype).removeprefix("mlx.core."),
        "drafter": "none" if pair.drafter is None else "yes",
    }


def fingerprint(folder: Path) -> str:
    """A quick hash of a checkpoint: config.json, and of each weight file its name, size, first and last megabyte."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    return f"sha256 {digest.hexdigest()[:16]} (config.json; names, sizes, ends of the weight files)"
