"""What the converter's tests share: golden pairs as sources, the command run in-process, checkpoints taken apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support import GOLDENS

from mlx_mtp import api, score
from mlx_mtp.checkpoint.loader import load_target
from mlx_mtp.convert.__main__ import main

TOKENS = [(7 * i * i + 3 * i) % 256 for i in range(40)]
DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}


def source_pair(kind: str, folder: Path) -> Path:
    """The golden pair of a kind as <folder>/<kind> and <folder>/<kind>-assistant; returns the target's."""
    for part, name in (("target", kind), ("assistant", f"{kind}-assistant")):
        shutil.copytree(GOLDENS / kind / part, folder / name, ignore=shutil.ignore_patterns("*.per_layer.json"))
    return folder / kind


def read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(read_json(path) | changes))


def tensors(folder: Path) -> dict[str, mx.array]:
    """All tensors of a checkpoint."""
    found: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        found |= loaded
    return found


def save(folder: Path, weights: Mapping[str, mx.array], name: str = "model.safetensors") -> None:
    mx.save_safetensors(str(folder / name), dict(weights))


def our_logits(folder: Path) -> mx.array:
    """Logits of TOKENS in float32: [L, V]."""
    target, _ = load_target(folder, mx.float32)
    return score(api.Pair(target, None, None, 4096), TOKENS)  # type: ignore[arg-type]


def is_equal(one: mx.array, other: mx.array) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and bool(mx.array_equal(one, other).item())


def everything_in(folder: Path) -> dict[str, bytes | None]:
    """All paths below a folder with their contents, None for folders."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in sorted(folder.rglob("*"))}


def convert(source: Path, output: Path, *flags: str, verify: bool = False) -> int:
    """Runs the command in this process; returns its exit code."""
    return main(["--hf-path", str(source), "--mlx-path", str(output), *([] if verify else ["--no-verify"]), *flags])


def complaint(capsys: pytest.CaptureFixture[str], source: Path, output: Path, *flags: str) -> str:
    """Runs a command that must fail with exit code 2 and one line, and returns that line."""
    capsys.readouterr()
    assert convert(source, output, *flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]
