"""Text in, text out: load a pair, generate with it, score with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, overload

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mtp import demo
from mlx_mtp.checkpoint import memory
from mlx_mtp.checkpoint.hub import find_drafter, local_folder
from mlx_mtp.checkpoint.loader import (
    check_draft_bits,
    check_pair,
    default_dtype,
    load_drafter,
    load_target,
    materialize,
)
from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import FinishReason, Request, RequestStats
from mlx_mtp.errors import RequestError
from mlx_mtp.kv_cache import KVCache, layer_shapes
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from mlx_mtp.tokenizer import Tokenizer

Prompt = str | Sequence[int]
AUTO = "auto"
PLANNED_CONTEXT = 8192  # tokens that the memory check allows for where nobody says more or less


@dataclass(frozen=True)
class Pair:
    """A target and the drafter made for it (or none), ready to run.

    max_context: tokens that prompt and answer together may have. notes: what a user should know about the loading.
    """

    target: Target
    drafter: Drafter | None
    tokenizer: Tokenizer
    max_context: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """A finished completion. tokens: the generated ids without the stop token."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stats: RequestStats


@dataclass(frozen=True)
class Segment:
    """A piece of a completion as it comes. index: which prompt of the batch; result: the whole, at its end."""

    index: int
    text: str
    tokens: list[int]
    result: Result | None = None

    @property
    def finish_reason(self) -> FinishReason | None:
        return None if self.result is None else self.result.finish_reason

    @property
    def stats(self) -> RequestStats | None:
        return None if self.result is None else self.result.stats


def load(
    model: str | Path | None = None,
    draft_model: str | Path | None = AUTO,
    *,
    draft_bits: int | None = None,
    max_context: int | None = None,
    dtype: mx.Dtype | None = None,
    before_reading: Callable[[Pair], object] | None = None,
) -> Pair:
    """Loads a target and its drafter.

    model: a checkpoint folder or a Hub name; None is the small pair that comes with the package.
    draft_model: likewise; "auto" looks for `<model>-assistant` beside the folder or on the Hub; None: no drafter.
    draft_bits: quantizes the drafter while loading. max_context: tokens to plan memory for, and the limit of prompt
    and answer together; None is the model's own limit. dtype: of the weights; None is float32 on CPU, else the
    checkpoint's own. before_reading is handed the pair while no weight is read yet, to raise early (see `check`).

    Raises CheckpointError, ConfigError, PairError, MemoryBudgetError or RequestError, each before any weight is read
    if it can be known by then.
    """
    notes = []
    if model is None:
        model = demo.TARGET
        notes.append("no model given: using the built-in demonstration pair (its text has the form of an answer, "
                     "not the content)")
    check_draft_bits(draft_bits)
    if max_context is not None and max_context < 2:
        raise RequestError(f"max_context is {max_context}; expected at least 2: a prompt and an answer")
    folder = local_folder(model)
    dtype = dtype or default_dtype()
    target, left_out = load_target(folder, dtype)
    if left_out:
        notes.append("left out: " + ", ".join(f"{count} tensors ({why})" for why, count in sorted(left_out.items())))

    draft_folder = find_drafter(model) if draft_model == AUTO else None
    if draft_model == AUTO and draft_folder is None:
        notes.append(f"no drafter found for {model}: decoding without one (--draft-model names one)")
    elif draft_model is not None and draft_model != AUTO:
        draft_folder = local_folder(draft_model)
    drafter = None if draft_folder is None else load_drafter(draft_folder, dtype, draft_bits)
    if drafter is not None:
        check_pair(target.config, drafter.config, f"{folder}", f"{draft_folder}")

    text = target.config.text
    context = min(max_context or text.max_context, text.max_context)
    planned = min(context, max_context or PLANNED_CONTEXT)
    weight_bytes = _nbytes(target) + (0 if drafter is None else _nbytes(drafter))
    slack = EngineConfig().max_draft_tokens + 1
    memory.check_memory(text, weight_bytes, planned, slack, target.dtype, memory.device_memory())

    tokenizer = Tokenizer(folder)
    pair = Pair(target, drafter, tokenizer, context, tuple(notes))
    if before_reading is not None:
        before_reading(pair)
    materialize(target, "target", folder)
    if drafter is not None and draft_folder is not None:
        materialize(drafter, "drafter", draft_folder)
    return pair


@overload
def generate(pair: Pair, prompt: str, **settings: Any) -> Result: ...
@overload
def generate(pair: Pair, prompt: Sequence[int] | Sequence[Prompt], **settings: Any) -> Result | list[Result]: ...
def generate(pair: Pair, prompt: Prompt | Sequence[Prompt], **settings: Any) -> Result | list[Result]:
    """Completes a prompt, or a list of prompts as one batch: one result, or a list in the prompts' order.

    prompt: text as it stands (for a conversation see `Tokenizer.encode_chat`), or token ids.
    settings: the fields of SamplingParams; `sampling`: a SamplingParams for all rows, or a list with one for each;
    `num_draft_tokens`: drafts a round, 0 for plain decoding. Neither it nor the batch changes the text.
    Raises RequestError for an empty or too long prompt and for unknown or impossible settings.
    """
    results: dict[int, Result] = {}
    for segment in stream_generate(pair, prompt, **settings):
        if segment.result is not None:
            results[segment.index] = segment.result
    return [results[i] for i in sorted(results)] if _is_batch(prompt) else results[0]


def stream_generate(
    pair: Pair, prompt: Prompt | Sequence[Prompt], *, on_prefill: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Iterator[Segment]:
    """Like `generate`, but yields segments as they come; each row's last one carries its result.

    on_prefill(done, total) is told of the prompt tokens run so far.
    """
    requests, config = _requests(pair, prompt, settings)
    return _stream(pair, requests, config, on_prefill)


def check(pair: Pair, prompt: Prompt | Sequence[Prompt], **settings: Any) -> None:
    """Raises the RequestError that `generate` would raise for these arguments; runs nothing and reads no weight."""
    _requests(pair, prompt, settings)


def score(pair: Pair, tokens: Sequence[int], *, chunk: int = 512) -> mx.array:
    """The target's logits for every position of `tokens`: [L, V] float32, row i scoring what follows token i."""
    if not tokens:
        raise RequestError("there are no tokens to score: expected at least one")
    text = pair.target.config.text
    cache = KVCache(layer_shapes(text), text.window, 1, 1, pair.target.dtype, len(tokens))
    rows = []
    for start in range(0, len(tokens), chunk):
        piece = mx.array([list(tokens[start : start + chunk])], mx.int32)
        count = mx.array([piece.shape[1]], mx.int32)
        hidden = pair.target(piece, cache.stage(piece.shape[1], count))
        cache.commit(count, piece.shape[1])
        rows.append(pair.target.logits(hidden)[0].astype(mx.float32))
        mx.eval(rows[-1], *cache.arrays)
    return mx.concatenate(rows)


def _requests(
    pair: Pair, prompt: Prompt | Sequence[Prompt], settings: dict[str, Any]
) -> tuple[list[Request], EngineConfig]:
    prompts: Sequence[Prompt] = prompt if _is_batch(prompt) else [prompt]  # type: ignore[assignment, list-item]
    sampling, config = _settings(len(prompts), settings)
    requests = [
        Request(_tokens(pair, text), one, pair.tokenizer.stop_tokens, pair.max_context)
        for text, one in zip(prompts, sampling, strict=True)
    ]
    if not requests:
        raise RequestError("the list of prompts is empty: expected at least one prompt")
    return requests, config


def _stream(
    pair: Pair, requests: Sequence[Request], config: EngineConfig, on_prefill: Callable[[int, int], None] | None
) -> Iterator[Segment]:
    streams = [pair.tokenizer.stream(request.sampling.stop) for request in requests]
    index = {id(request): i for i, request in enumerate(requests)}
    mx.reset_peak_memory()
    for event in Engine(pair.target, pair.drafter, config).run(requests, on_prefill):
        request, i = event.request, index[id(event.request)]
        text = streams[i].add(event.tokens)
        if request.is_finished:
            text += streams[i].finish()
        tokens = event.tokens
        if streams[i].is_stopped:
            surplus = request.stop_after(streams[i].num_tokens)
            tokens = tokens[: len(tokens) - surplus]
        if request.finish_reason is None:
            yield Segment(i, text, tokens)
            continue
        stats = request.stats(mx.get_peak_memory() / memory.GB)
        yield Segment(i, text, tokens, Result(streams[i].text, request.tokens, request.finish_reason, stats))


def _settings(rows: int, given: dict[str, Any]) -> tuple[list[SamplingParams], EngineConfig]:
    names = {field.name for field in fields(SamplingParams)}
    unknown = sorted(set(given) - names - {"sampling", "num_draft_tokens"})
    if unknown:
        raise RequestError(f"unknown setting {unknown[0]!r}; expected one of "
                           f"{', '.join(sorted(names | {'sampling', 'num_draft_tokens'}))}")
    base = given.get("sampling", SamplingParams())
    per_row = [base] * rows if isinstance(base, SamplingParams) else list(base)
    if len(per_row) != rows:
        raise RequestError(f"sampling has {len(per_row)} entries for {rows} prompts; expected one for each")
    changes = {name: value for name, value in given.items() if name in names}
    config = EngineConfig()
    if given.get("num_draft_tokens") is not None:
        config = replace(config, num_draft_tokens=given["num_draft_tokens"])
    return [replace(params, **changes) for params in per_row], config


def _is_batch(prompt: Prompt | Sequence[Prompt]) -> bool:
    return not isinstance(prompt, str) and any(isinstance(part, Sequence) for part in prompt)


def _tokens(pair: Pair, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str) and not prompt:
        raise RequestError("the prompt is empty: expected some text")
    vocab_size = pair.target.config.text.vocab_size
    tokens = pair.tokenizer.encode(prompt) if isinstance(prompt, str) else [int(token) for token in prompt]
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise RequestError(f"the prompt holds token {token}; expected ids from 0 to {vocab_size - 1}")
    return tokens


def _nbytes(model: Target | Drafter) -> int:
    return sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())
