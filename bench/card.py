"""The environment card: what a figure was measured on, and with which checkpoint."""

from __future__ import annotations

import os
import platform
import subprocess
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from bench import blas
from mlx_mtp import Pair
from mlx_mtp.check.environment import fingerprint
from mlx_mtp.device import memory_bytes

PACKAGES = ("mlx-mtp", "mlx", "mlx-lm", "mlx-vlm", "numpy")


def environment_card() -> dict[str, str]:
    """Machine, backend, BLAS, versions and power source, as text."""
    device = mx.default_device()
    return {
        "machine": f"{chip()}, {os.cpu_count()} cores, {_machine_memory() / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "backend": f"MLX {version('mlx')} on {device.type.name}, {memory_bytes() / 1e9:.0f} GB for models",
        "blas": blas.name(),
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {installed(name)}" for name in PACKAGES if installed(name)),
        "power": power_source(),
    }


def checkpoint_card(pair: Pair, target: Path, drafter: Path | None) -> dict[str, str]:
    """Which checkpoints these are, and in what numbers they run."""
    card = {"target": f"{target.name}, {fingerprint(target)}", "target numbers": numbers(pair.target)}
    if drafter is not None and pair.drafter is not None:
        card |= {"drafter": f"{drafter.name}, {fingerprint(drafter)}", "drafter numbers": numbers(pair.drafter)}
    return card


def print_card(card: dict[str, str]) -> None:
    for key, value in card.items():
        print(f"{key:16} {value}")


def chip() -> str:
    """The GPU that is used, else the processor."""
    name = mx.device_info().get("device_name")
    if name:
        return str(name)
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or "unknown chip"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def power_source(supplies: Path = Path("/sys/class/power_supply")) -> str:
    """Mains or battery, as macOS or Linux says it; a Mac on battery is slower."""
    if platform.system() == "Darwin":
        said = _output("pmset", "-g", "batt")
        return said.split("'")[1] if said.count("'") >= 2 else "unknown"
    online = [file.read_text().strip() == "1" for file in sorted(supplies.glob("*/online"))]
    if online:
        return "mains" if any(online) else "battery"
    return "unknown"


def numbers(model: nn.Module) -> str:
    """Parameters, bytes, dtype, and the bits of the weights, most common first; what is below 1% is left out."""
    kinds: Counter[str] = Counter()
    count = nbytes = 0
    dtype = ""
    for path, module in model.named_modules():
        own = {name: array for name, array in module.items() if isinstance(array, mx.array) and name[0] != "_"}
        nbytes += sum(array.nbytes for array in own.values())
        if "scales" in own:
            size = own["weight"].size * 32 // module.bits
            kinds[f"{module.bits} bits ({module.mode}, groups of {module.group_size})"] += size
        else:
            size = sum(array.size for array in own.values())
            kinds["unquantized"] += size
        count += size
        if path == "norm":
            dtype = str(module.weight.dtype).removeprefix("mlx.core.")
    most = [(kind, size) for kind, size in kinds.most_common() if size >= count / 100]
    share = ", ".join(f"{kind} {size / count:.0%}" if len(most) > 1 else kind for kind, size in most)
    return f"{_short(count)} parameters, {nbytes / 1e6:,.1f} MB, {dtype}, {share}"


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _output(*command: str) -> str:
    """What a system's own tool says, or nothing where there is no such tool."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=10).stdout.strip()
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
