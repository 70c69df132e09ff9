"""mlx-vlm with its MTP drafter, through its public interfaces. Imports it: needs the extra `peers`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_vlm
import numpy as np
from mlx_vlm.generate import BatchGenerator
from mlx_vlm.speculative.drafters import load_drafter
from mlx_vlm.speculative.drafters.gemma4_assistant import Gemma4AssistantDraftModel

from bench.measure import Tokens
from bench.peers import cast
from bench.runners import Drafting, Prompts


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


class VlmPeer:
    """mlx-vlm's target and MTP drafter, loaded once.

    work: an empty folder for a view of the checkpoint whose config.json says what mlx-vlm must find in it.
    """

    def __init__(self, target: Path, drafter: Path, dtype: mx.Dtype, work: Path) -> None:
        self.target, self.processor = mlx_vlm.load(str(_view(target, work)))
        cast(self.target, dtype)
        self.drafter = cast(load_drafter(str(drafter))[0], dtype)
        self.processor.tokenizer.stopping_criteria = _NeverStop()


class VlmRunner:
    """mlx-vlm's BatchGenerator with its MTP drafter. Rows must be handed over by growing prompt length.

    drafts: [rows, positions], what the drafter is made to say at each position; None lets it speak.
    """

    name = "mlx-vlm"

    def __init__(self, peer: VlmPeer, num_draft_tokens: int, drafts: np.ndarray | None) -> None:
        self.num_draft_tokens = num_draft_tokens
        self._peer, self._drafts = peer, drafts

    def steps(self, prompts: Prompts, max_tokens: int) -> Iterator[Tokens]:
        target, drafter = self._peer.target, self._peer.drafter
        drafter.__class__ = Gemma4AssistantDraftModel if self._drafts is None else _Replay
        if self._drafts is not None:
            drafter.replay(self._drafts)
        drafter.config.block_size = self.num_draft_tokens + 1
        batch = BatchGenerator(
            target.language_model, self._peer.processor, max_tokens=max_tokens, compute_logprobs=False,
            greedy_sampling=True, completion_batch_size=len(prompts), prefill_batch_size=len(prompts),
            draft_model=drafter, draft_kind="mtp", draft_block_size=self.num_draft_tokens + 1)
        embedded = [target.get_input_embeddings(mx.array([prompt])).to_dict() for prompt in prompts]
        uids = batch.insert(list(prompts), max_tokens=max_tokens, prompt_kwargs=[
            {key: value for key, value in each.items() if value is not None} for each in embedded])
        row = {uid: i for i, uid in enumerate(uids)}
        while batch.has_work:
            _, responses = batch.next()
            yield [(row[response.uid], int(response.token)) for response in responses]
        batch.close()

    def drafting(self) -> Drafting | None:
        accepted = self._peer.drafter.accept_lens  # of each round, averaged over its rows
        return Drafting(len(accepted), sum(accepted)) if accepted else None


def _view(folder: Path, work: Path) -> Path:
    """The checkpoint by links: mlx-vlm wants vocab_size at the top of config.json, and no null in place of a tower."""
    for path in folder.iterdir():
        if path.name != "config.json":
            (work / path.name).symlink_to(path.resolve())
    config = json.loads((folder / "config.json").read_text())
    config.setdefault("vocab_size", config["text_config"]["vocab_size"])
    kept = {key: value for key, value in config.items() if key != "vision_config" or value is not None}
    (work / "config.json").write_text(json.dumps(kept))
    return work
