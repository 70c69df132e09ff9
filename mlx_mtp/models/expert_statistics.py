"""How well routes share experts: counted on request, on the device, without a wait."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class RoutingStatistics:
    """Of one or more passes of one or more layers. A pass here is one layer's."""

    passes: int
    routes: int
    distinct: int

    @property
    def distinct_per_pass(self) -> float:
        """Experts that a pass touched, on average: what must be read at least."""
        return self.distinct / max(self.passes, 1)

    @property
    def reuse(self) -> float:
        """Routes for each expert touched: how many times fewer reads there can be than routes."""
        return self.routes / max(self.distinct, 1)


def distinct_experts(experts: mx.array) -> mx.array:
    """How many different experts occur in experts [...], as a scalar int32."""
    ordered = mx.sort(experts.flatten())
    return 1 + (ordered[1:] != ordered[:-1]).sum()


class RoutingCounter:
    """Is told the experts of every pass; may be shared by all layers."""

    def __init__(self) -> None:
        self._routes: list[int] = []
        self._distinct: list[mx.array] = []

    def add(self, experts: mx.array) -> None:
        """experts: [N, top_k], those chosen in one pass of one layer."""
        self._routes.append(experts.size)
        self._distinct.append(distinct_experts(experts))

    def statistics(self) -> RoutingStatistics:
        """What was counted so far. Waits for the device."""
        distinct = sum(self._distinct, mx.array(0))
        return RoutingStatistics(len(self._routes), sum(self._routes), int(distinct))


class Uncounted(RoutingCounter):
    """What a layer is given where nobody asks: counts nothing."""

    def add(self, experts: mx.array) -> None:
        pass
