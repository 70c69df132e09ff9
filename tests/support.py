"""What several tests share: the golden checkpoints, random prompts, plain decoding as the oracle, a replay drafter."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mtp.checkpoint.loader import load_drafter, load_target, materialize
from mlx_mtp.config import AttentionKind, EngineConfig, SamplingParams
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import Request
from mlx_mtp.kv_cache import KVCache, layer_shapes
from mlx_mtp.models.drafter import Candidates, Drafter
from mlx_mtp.models.target import Target
from mlx_mtp.spec_decode.loop import DraftModel

GOLDENS = Path(__file__).parent / "goldens"
KINDS = ("dense", "mixture", "edge", "unified")


@functools.cache
def golden_pair(kind: str) -> tuple[Target, Drafter]:
    folder = GOLDENS / kind
    target, _ = load_target(folder / "target", mx.float32)
    drafter = load_drafter(folder / "assistant", mx.float32)
    materialize(target, "target", folder)  # lays the weights out as a user's are
    materialize(drafter, "drafter", folder)
    return target, drafter


@functools.cache
def golden(kind: str) -> dict[str, mx.array]:
    arrays = mx.load(str(GOLDENS / kind / "golden.safetensors"))
    assert isinstance(arrays, dict)
    return arrays


def relative_error(got: mx.array, expected: mx.array) -> float:
    """max |difference| / max |expected|."""
    return float((mx.abs(got - expected).max() / mx.abs(expected).max()).item())


def new_cache(target: Target, rows: int = 1, slack: int = 8, reserve: int = 0) -> KVCache:
    text = target.config.text
    return KVCache(layer_shapes(text), text.window, slack, rows, target.dtype, reserve)


def random_prompts(seed: int, count: int, longest: int, vocab_size: int) -> list[list[int]]:
    """Prompts of random lengths 1 .. longest that begin with <bos>."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, count)
    return [[2, *generator.integers(3, vocab_size, length - 1).tolist()] for length in lengths]


def decode(
    target: Target,
    drafter: DraftModel | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[SamplingParams],
    num_draft_tokens: int = 0,
    stop_tokens: frozenset[int] = frozenset(),
    prefill_chunk: int = 512,
) -> list[Request]:
    """Runs the prompts as one batch to the end; returns the requests with their tokens and statistics."""
    requests = [Request(p, s, stop_tokens, 100_000) for p, s in zip(prompts, sampling, strict=True)]
    config = EngineConfig(num_draft_tokens=num_draft_tokens, prefill_chunk=prefill_chunk)
    for _ in Engine(target, drafter, config).run(requests):
        pass
    return requests


class ReplayContext:
    """The replay drafter's state within a round: the step that comes next, at [B] positions."""

    def __init__(self, newest_positions: mx.array) -> None:
        self.positions = newest_positions
        self.steps = 0


class ReplayDrafter:
    """Drafts known texts, wrong on purpose where `correct` [rows, positions] says 0; rows keep their order.

    texts: [rows, positions] token ids by absolute position. Only for batches whose rows join in order and end together.
    """

    def __init__(self, texts: np.ndarray, correct: np.ndarray, vocab_size: int) -> None:
        wrong = (texts + 1) % vocab_size
        self._drafts = mx.array(np.where(correct, texts, wrong).astype(np.int32))
        self._vocab_size = vocab_size

    def context(
        self,
        keys_values: Mapping[AttentionKind, tuple[mx.array, mx.array]],
        key_positions: Mapping[AttentionKind, mx.array],
        newest_positions: mx.array,
    ) -> ReplayContext:
        return ReplayContext(newest_positions)

    def __call__(
        self, embedding: mx.array, hidden: mx.array, context: ReplayContext
    ) -> tuple[Candidates, mx.array]:
        context.steps += 1
        where = mx.minimum(context.positions + context.steps, self._drafts.shape[1] - 1)
        token = mx.take_along_axis(self._drafts[: where.size], where[:, None], axis=1)
        logits = mx.where(mx.arange(self._vocab_size) == token, 1e4, 0.0)
        return Candidates(logits), hidden
