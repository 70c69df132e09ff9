"""mlx_mtp: Gemma 4 with its Multi-Token Prediction drafter on MLX, faster and with exactly the same text."""

from mlx_mtp.api import Pair, Result, Segment, generate, load, new_engine, new_request, score, stream_generate
from mlx_mtp.config import SamplingParams
from mlx_mtp.errors import (
    CheckpointError,
    ConfigError,
    MemoryBudgetError,
    MtpError,
    PairError,
    QueueFullError,
    RequestError,
)

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "MemoryBudgetError",
    "MtpError",
    "Pair",
    "PairError",
    "QueueFullError",
    "RequestError",
    "Result",
    "SamplingParams",
    "Segment",
    "generate",
    "load",
    "new_engine",
    "new_request",
    "score",
    "stream_generate",
]
