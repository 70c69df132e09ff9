"""Source and output over one text, each run layer by layer, so that neither has to fit into memory.

    tokens -> hidden states of the source [T, D]    one layer's weights at a time, read from disk and let go
    tokens -> hidden states of the output [T, D]    likewise
    hidden states -> logits of both, a few positions at a time: perplexity, KL, agreement

What is held at once: of each embedding the text's rows, one layer, and at the end both heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_mtp.checkpoint.loader import default_dtype, load_target
from mlx_mtp.convert.report import TextComparison
from mlx_mtp.convert.tensor_errors import Module, Progress, read_rows, stored_modules
from mlx_mtp.kv_cache import KVCache, layer_shapes
from mlx_mtp.models.decoder_layer import DecoderLayer
from mlx_mtp.models.target import Target

LOGITS_AT_ONCE = 2**24  # numbers of [positions, V] compared at a time: 64 MB in float32, a handful of such arrays
TABLES = ("embed_tokens", "embed_tokens_per_layer")


@dataclass(frozen=True)
class Text:
    """Token ids to compare on, and a name that says which text they are."""

    tokens: Sequence[int]
    name: str


class PassingLayer(DecoderLayer):
    """A decoder layer for one pass: once its output is there it tells `done` and has no weights any more."""

    def __init__(self, layer: DecoderLayer, done: Callable[[], None]) -> None:
        nn.Module.__init__(self)  # not the layer's own, which would make new weights
        self.__dict__.update(vars(layer))
        for name, part in layer.items():
            self[name] = part
        self._done = done

    def finish(self, residual: mx.array, attended: mx.array, per_layer_input: mx.array | None) -> mx.array:
        x = super().finish(residual, attended, per_layer_input)
        mx.eval(x)
        self.clear()  # a Module is the dict of its parts
        self._done()
        return x


def hidden_states(
    folder: Path, tokens: Sequence[int], progress: Progress, dtype: mx.Dtype | None = None
) -> mx.array:
    """The target's hidden states after its final norm over `tokens`, [T, D], from one pass that holds one layer.

    dtype: of the weights; None is the loader's default. progress(what, done, total) is told of layers.
    """
    target, _ = load_target(folder, dtype or default_dtype())
    ids = _keep_rows(target, stored_modules(folder, "target"), tokens)
    count, finished = len(target.layers), 0

    def read_next() -> None:  # before anything runs on it, see `device.reading`
        if finished < count:
            mx.eval(target.layers[finished].parameters())

    def done() -> None:
        nonlocal finished
        finished += 1
        progress(f"running {folder.name}", finished, count)
        read_next()

    for i in range(count):
        target.layers[i] = PassingLayer(target.layers[i], done)
    read_next()
    text, length = target.config.text, mx.array([len(tokens)], mx.int32)
    cache = KVCache(layer_shapes(text), text.window, 1, 1, target.dtype, len(tokens))
    hidden = target(ids[None], cache.stage(len(tokens), length))[0]
    mx.eval(hidden)
    return hidden


def compare(
    source: Path, output: Path, text: Text, progress: Progress, dtype: mx.Dtype | None = None
) -> TextComparison:
    """Perplexities, KL(source || output) and agreement over a text of at least two tokens."""
    before = hidden_states(source, text.tokens, progress, dtype)
    after = hidden_states(output, text.tokens, progress, dtype)
    source_head, output_head = (load_target(folder, dtype or default_dtype())[0] for folder in (source, output))
    mx.eval([head.embed_tokens.parameters() for head in (source_head, output_head)])
    positions = len(text.tokens) - 1
    step = max(1, LOGITS_AT_ONCE // source_head.config.text.vocab_size)
    sums = np.zeros(4)
    for start in range(0, positions, step):
        stop = min(start + step, positions)
        following = mx.array(list(text.tokens[start + 1 : stop + 1]), mx.int32)
        logits = source_head.logits(before[start:stop]), output_head.logits(after[start:stop])
        sums += _compare_logits(*logits, following)
        progress("comparing predictions", stop, positions)
    source_nats, output_nats, kl, agreed = (float(number) / positions for number in sums)
    return TextComparison(
        text=text.name,
        tokens=len(text.tokens),
        positions=positions,
        source_perplexity=_exp(source_nats),
        output_perplexity=_exp(output_nats),
        kl=kl,
        top1_agreement=agreed,
        dtype=str(source_head.dtype).removeprefix("mlx.core."),
    )


def _compare_logits(source: mx.array, output: mx.array, following: mx.array) -> np.ndarray:
    """Sums over positions: [nats of source, nats of output, KL, same best token]; logits [P, V], following [P]."""
    same = (mx.argmax(source, axis=-1) == mx.argmax(output, axis=-1)).astype(mx.float32)
    one, other = (logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                  for logits in (source.astype(mx.float32), output.astype(mx.float32)))
    kl = (mx.exp(one) * (one - other)).sum(axis=-1)
    nats = [-mx.take_along_axis(log_probs, following[:, None], axis=-1)[:, 0] for log_probs in (one, other)]
    return np.array(mx.stack([*nats, kl, same])).astype(np.float64).sum(axis=1)


def _keep_rows(target: Target, modules: dict[str, Module], tokens: Sequence[int]) -> mx.array:
    """Cuts the embeddings down to the text's own rows, read from disk; returns the tokens as rows of what is left.

    The tables are the largest tensors there are (5.6 GB in bfloat16 for E4B's per layer), and a text needs few rows.
    """
    used, ids = np.unique(np.array(tokens), return_inverse=True)
    for name in TABLES:
        if name not in target:
            continue
        table, stored = target[name], modules[name]
        for key, tensor in (("weight", stored.weight), ("scales", stored.scales), ("biases", stored.biases)):
            if tensor is not None:
                rows = mx.concatenate([read_rows(tensor, int(row), int(row) + 1) for row in used])
                table[key] = rows.astype(table[key].dtype)  # cast as the loader does; packed numbers need none
                mx.eval(table[key])
    return mx.array(ids.astype(np.int32))


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
