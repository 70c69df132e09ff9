"""mlx-lm through its public interfaces: plain decoding, for it has no MTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import BatchGenerator

from bench.measure import Tokens
from bench.peers import cast
from bench.runners import Drafting, Prompts


class LmPeer:
    """mlx-lm's target, loaded once."""

    def __init__(self, target: Path, dtype: mx.Dtype) -> None:
        self.target = cast(mlx_lm.load(str(target))[0], dtype)


class LmRunner:
    """mlx-lm's BatchGenerator: plain decoding, for it has no MTP."""

    name, num_draft_tokens = "mlx-lm", 0

    def __init__(self, peer: LmPeer) -> None:
        self._target = peer.target

    def steps(self, prompts: Prompts, max_tokens: int) -> Iterator[Tokens]:
        batch = BatchGenerator(self._target, max_tokens=max_tokens, completion_batch_size=len(prompts),
                                 prefill_batch_size=len(prompts))
        uids = batch.insert(list(prompts), max_tokens=[max_tokens] * len(prompts))
        row = {uid: i for i, uid in enumerate(uids)}
        while responses := batch.next_generated():
            yield [(row[response.uid], int(response.token)) for response in responses]
        batch.close()

    def drafting(self) -> Drafting | None:
        return None
