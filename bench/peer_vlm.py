"""mlx-vlm's and mlx-lm's batches through their public interfaces, for `bench.batch`. Needs the extra `peers`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import mlx_vlm
import numpy as np
from mlx.utils import tree_map
from mlx_lm.generate import BatchGenerator as LmBatchGenerator
from mlx_vlm.generate import BatchGenerator as VlmBatchGenerator
from mlx_vlm.speculative.drafters import load_drafter
from mlx_vlm.speculative.drafters.gemma4_assistant import Gemma4AssistantDraftModel

Tokens = list[tuple[int, int]]  # (row, token) of one step


class _NeverStop:
    """In place of the tokenizer's stopping criteria: texts are as long as was asked for."""

    def __call__(self, token: int) -> bool:
        return False

    def add_eos_token_ids(self, ids: object) -> None: ...

    def reset(self, *_: object) -> None: ...


class _Replay(Gemma4AssistantDraftModel):  # type: ignore[misc]
    """The replay of `bench.replay` for mlx-vlm: the drafter's forward is run, a known text is drafted."""

    def replay(self, drafts: np.ndarray) -> None:
        object.__setattr__(self, "_drafts", mx.array(np.pad(drafts, ((0, 0), (0, 32)))))

    def reset(self, target: Any, **settings: Any) -> Any:
        self._rows, self._next_row = list(range(self._drafts.shape[0])), 0
        return super().reset(target, **settings)

    def filter_batch(self, keep: mx.array) -> None:
        self._rows = [self._rows[i] for i in keep.tolist()]

    def draft_block(
        self, last: mx.array, hidden: mx.array, cache: Any, block: int, *args: Any, **kwargs: Any
    ) -> mx.array:
        real = super().draft_block(last, hidden, cache, block, *args, **kwargs)
        rows = self._rows
        if hidden.shape[0] != len(rows):  # ragged rows are drafted one by one
            rows = [self._rows[self._next_row]]
            self._next_row = (self._next_row + 1) % len(self._rows)
        newest = mx.broadcast_to(mx.array(self._kv_valid_len).reshape(-1), (len(rows),))
        known = mx.take_along_axis(self._drafts[mx.array(rows)], newest[:, None] + mx.arange(1, block)[None], axis=1)
        return mx.where(real >= 0, known, real).astype(real.dtype)  # so that `real` is really run


def _float32(model: Any) -> Any:
    model.update(tree_map(lambda a: a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a,
                          model.parameters()))
    mx.eval(model.parameters())
    return model


class VlmPeer:
    """mlx-vlm's BatchGenerator with its MTP drafter. Rows must be handed over by growing prompt length."""

    def __init__(self, folder: Path) -> None:
        self._target, self._processor = mlx_vlm.load(str(folder))
        _float32(self._target)
        self._drafter = _float32(load_drafter(str(folder) + "-assistant")[0])
        self._processor.tokenizer.stopping_criteria = _NeverStop()

    def steps(self, prompts: Sequence[list[int]], max_tokens: int, drafts: np.ndarray, k: int) -> Iterator[Tokens]:
        """drafts: [rows, positions], what the drafter is made to say at each position."""
        self._drafter.__class__ = _Replay
        self._drafter.replay(drafts)
        self._drafter.config.block_size = k + 1
        batch = VlmBatchGenerator(
            self._target.language_model, self._processor, max_tokens=max_tokens, compute_logprobs=False,
            greedy_sampling=True, completion_batch_size=len(prompts), prefill_batch_size=len(prompts),
            draft_model=self._drafter, draft_kind="mtp", draft_block_size=k + 1)
        embedded = [self._target.get_input_embeddings(mx.array([prompt])).to_dict() for prompt in prompts]
        uids = batch.insert(list(prompts), max_tokens=max_tokens, prompt_kwargs=[
            {key: value for key, value in each.items() if value is not None} for each in embedded])
        row = {uid: i for i, uid in enumerate(uids)}
        while batch.has_work:
            _, responses = batch.next()
            yield [(row[response.uid], int(response.token)) for response in responses]
        batch.close()


class LmPeer:
    """mlx-lm's BatchGenerator: plain decoding."""

    def __init__(self, folder: Path) -> None:
        self._target = _float32(mlx_lm.load(str(folder))[0])

    def steps(self, prompts: Sequence[list[int]], max_tokens: int) -> Iterator[Tokens]:
        batch = LmBatchGenerator(self._target, max_tokens=max_tokens, completion_batch_size=len(prompts),
                                 prefill_batch_size=len(prompts))
        uids = batch.insert(list(prompts), max_tokens=[max_tokens] * len(prompts))
        row = {uid: i for i, uid in enumerate(uids)}
        while responses := batch.next_generated():
            yield [(row[response.uid], int(response.token)) for response in responses]
        batch.close()
