"""The converter from Hugging Face checkpoints to MLX: `python -m mlx_mtp.convert`, or `convert` from Python.

Sources are read tensor by tensor, so that memory bounds neither the source nor the result.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_mtp.convert.run import Conversion

__all__ = ["convert"]


def convert(hf_path: str | Path, **settings: Any) -> Conversion:
    """Converts a checkpoint; `settings` are the fields of `settings.ConvertConfig`, which has the defaults.

    Notes go to stderr. Raises MtpError, after which the output is as it was before.
    """
    from mlx_mtp.convert import run
    from mlx_mtp.convert.settings import ConvertConfig
    from mlx_mtp.errors import RequestError

    unknown = sorted(settings.keys() - ConvertConfig.__dataclass_fields__.keys())
    if unknown:
        raise RequestError(f"unknown setting {unknown[0]!r}; expected one of "
                           f"{', '.join(ConvertConfig.__dataclass_fields__)}")
    return run.run(ConvertConfig(str(hf_path), **settings), lambda line: print(line, file=sys.stderr))
