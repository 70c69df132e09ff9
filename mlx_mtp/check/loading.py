"""A pair as `generate` runs it, but with no memory of earlier runs."""

from __future__ import annotations

from collections.abc import Callable

from mlx_mtp import api
from mlx_mtp.api import Pair
from mlx_mtp.calibration import CalibrationFile, default_path
from mlx_mtp.config import EngineConfig
from mlx_mtp.models.expert_calibration import choose_dispatch


def load(
    model: str | None, draft_model: str | None, *, draft_bits: int | None = None, max_context: int | None = None,
    before_reading: Callable[[Pair], object] | None = None, calibrate: bool = True, kernels: bool = True,
) -> Pair:
    """Loads what is to be judged or measured; arguments and errors are those of `mlx_mtp.load`.

    A mixture's experts take the way that was measured to be the fastest here, for it is the one that users run; with
    `calibrate` False, the default way. What rounds took in earlier processes is neither read nor kept, so that what
    K = "auto" does is learned in this run alone.
    """
    pair = api.load(model, draft_model, draft_bits=draft_bits, max_context=max_context, before_reading=before_reading,
                    calibrate=False)
    if calibrate:
        choose_fastest_dispatch(pair, kernels=kernels)
    return pair


def choose_fastest_dispatch(pair: Pair, *, kernels: bool = True) -> None:
    """As `mlx_mtp.load` does: by what was measured on this machine, now if it never was."""
    choose_dispatch(pair.target, CalibrationFile(default_path()), EngineConfig().prefill_chunk, kernels=kernels)
