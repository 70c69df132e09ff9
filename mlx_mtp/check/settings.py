"""What is swept. A default exists here and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mlx_mtp.config import AUTO, EngineConfig, SamplingParams
from mlx_mtp.errors import RequestError

NumDraftTokens = int | Literal["auto"]


@dataclass(frozen=True)
class CheckConfig:
    """rows: requests decoded together, at most; num_draft_tokens: drafts a round (K); every pair of them is a cell.

    max_tokens, temperatures: of each prompt's answers. tolerance: in logits; None is `margins.default_tolerance`.
    Raises RequestError for what the engine or the sampler would refuse.
    """

    rows: tuple[int, ...] = (1, 4, 8)
    num_draft_tokens: tuple[NumDraftTokens, ...] = (0, 1, 3, 7, AUTO)
    max_tokens: int = 20
    temperatures: tuple[float, ...] = (0.0, 1.0)
    tolerance: float | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "num_draft_tokens", "temperatures"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        for count in self.rows:
            if count < 1:
                raise RequestError(f"rows is {count}; expected whole numbers of at least 1")
        for num_draft_tokens in self.num_draft_tokens:
            EngineConfig(num_draft_tokens=num_draft_tokens)
        for temperature in self.temperatures:
            SamplingParams(self.max_tokens, temperature)
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise RequestError(f"tolerance is {self.tolerance}; expected a finite number of at least 0, in logits")


QUICK = CheckConfig(rows=(1, 4), num_draft_tokens=(0, 3, AUTO), max_tokens=10)
