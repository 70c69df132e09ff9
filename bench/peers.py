"""Which peers take part in a sweep: those that are installed and load the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from bench.runners import DraftLength, Runner
from mlx_mtp.errors import MtpError

if TYPE_CHECKING:
    from bench.peer_lm import LmPeer
    from bench.peer_vlm import VlmPeer


class NoPeerError(MtpError):
    """Peers were asked for and none is there."""


class LoadedPeers:
    """Makes their runners: mlx-lm plain, mlx-vlm with each K that is a number and not 0."""

    def __init__(self, lm: LmPeer | None, vlm: VlmPeer | None) -> None:
        self._lm, self._vlm = lm, vlm

    def runners(self, num_draft_tokens: Sequence[DraftLength], drafts: np.ndarray | None) -> list[Runner]:
        # Imported here: the modules import the peers, which need not be installed.
        found: list[Runner] = []
        if self._lm is not None:
            from bench.peer_lm import LmRunner

            found.append(LmRunner(self._lm))
        if self._vlm is not None:
            from bench.peer_vlm import VlmRunner

            found += [VlmRunner(self._vlm, k, drafts) for k in num_draft_tokens if k != "auto" and k > 0]
        return found


def load_peers(
    target: Path, drafter: Path | None, dtype: mx.Dtype, work: Path, tell: Callable[[str], None]
) -> LoadedPeers:
    """Loads those that can; tells which cannot, and why. Raises NoPeerError if none can."""
    def new_lm() -> LmPeer:
        from bench.peer_lm import LmPeer

        return LmPeer(target, dtype)

    def new_vlm() -> VlmPeer:
        from bench.peer_vlm import VlmPeer

        if drafter is None:
            raise NoPeerError("there is no drafter for it")
        return VlmPeer(target, drafter, dtype, work)

    lm, vlm = _loaded("mlx-lm", new_lm, tell), _loaded("mlx-vlm", new_vlm, tell)
    if lm is None and vlm is None:
        raise NoPeerError("--peers: neither mlx-lm nor mlx-vlm could be loaded: pip install 'mlx-mtp[peers]', or leave "
                          "--peers out")
    return LoadedPeers(lm, vlm)


def _loaded(name: str, load: Callable[[], Any], tell: Callable[[str], None]) -> Any:
    try:
        return load()
    except ImportError:
        tell(f"{name} does not take part: it is not installed (pip install 'mlx-mtp[peers]')")
    except Exception as error:  # what keeps a peer from loading a checkpoint is one of the bench's results
        tell(f"{name} does not take part: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return None


def cast(model: Any, dtype: mx.Dtype) -> Any:
    """A peer's model with everything in the dtype that this package's pair runs in."""
    model.update(tree_map(lambda a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters()))
    mx.eval(model.parameters())
    return model
