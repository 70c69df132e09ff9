"""Text in, text out: load a pair, generate with it, score with it."""

from __future__ import annotations

import difflib
import math
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, overload

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mtp import demo, device
from mlx_mtp.calibration import CalibrationFile, default_path, machine
from mlx_mtp.checkpoint import memory
from mlx_mtp.checkpoint.hub import find_drafter, local_folder, published_drafter
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
from mlx_mtp.errors import MtpError, RequestError
from mlx_mtp.kv_cache import KVCache, layer_shapes
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.expert_calibration import choose_dispatch
from mlx_mtp.models.moe import SwitchGLU
from mlx_mtp.models.target import Target
from mlx_mtp.prompt import is_batch, is_list, is_whole, tokens_of
from mlx_mtp.spec_decode.round_costs import RoundCosts, readable
from mlx_mtp.tokenizer import TextStream, Tokenizer

Prompt = str | Sequence[int]
AUTO = "auto"
NO_DRAFTER = "none"
ENGINE_SETTINGS = ("num_draft_tokens", "max_rows")
NEWS = 0.1  # of a round's time: changes below that are not worth writing down
PLANNED_CONTEXT = 8192  # tokens that the memory check allows for where nobody says more or less


@dataclass(frozen=True)
class Pair:
    """A target and the drafter made for it (or none), ready to run.

    max_context: tokens that prompt and answer together may have. notes: what a user should know about the loading.
    round_costs: what rounds were measured to take so far, which K = "auto" goes by. calibration: where that is kept.
    """

    target: Target
    drafter: Drafter | None
    tokenizer: Tokenizer
    max_context: int
    notes: tuple[str, ...] = ()
    round_costs: RoundCosts = field(default_factory=RoundCosts, compare=False)
    calibration: CalibrationFile | None = None


@dataclass(frozen=True)
class Result:
    """A finished completion. tokens: the generated ids without the stop token; where a stop string ended it, up to the
    one that made that whole."""

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
    calibrate: bool = True,
    kernels: bool = True,
) -> Pair:
    """Loads a target and its drafter.

    model: a checkpoint folder or a Hub name; None is the small pair that comes with the package.
    draft_model: likewise; "auto" looks for `<model>-assistant`, beside a folder or, given a Hub name, on the Hub, where
    Google's own will do too; "none" or None: none.
    draft_bits: quantizes the drafter while loading. max_context: tokens to plan memory for, and the limit of prompt
    and answer together; None is the model's own limit. dtype: of the weights; None is float32 on CPU, else the
    checkpoint's own. before_reading is handed the pair while no weight is read yet, to raise early (see `check`).
    calibrate: measure once which of several equal ways through a mixture's experts is the fastest here (a second or
    two), and keep that and what rounds take in the user's cache folder. kernels: try GPU kernels of our own as well.

    Raises CheckpointError, ConfigError, PairError, MemoryBudgetError or RequestError, each before any weight is read
    if it can be known by then.
    """
    _check_arguments(model, draft_model, max_context, dtype)
    notes = []
    if model is None:
        model = demo.TARGET
        notes.append("no model given: using the built-in demonstration pair (its text has the form of an answer, "
                     "not the content)")
    check_draft_bits(draft_bits)
    folder = local_folder(model)
    dtype = dtype or default_dtype()
    target, left_out = load_target(folder, dtype)
    if left_out:
        notes.append("left out: " + ", ".join(f"{count} tensors ({why})" for why, count in sorted(left_out.items())))

    draft_folder, drafter = _drafter(model, draft_model, target, draft_bits, notes)
    text = target.config.text
    context = min(max_context or text.max_context, text.max_context)
    planned = min(context, max_context or PLANNED_CONTEXT)
    weight_bytes = _nbytes(target) + (0 if drafter is None else _nbytes(drafter))
    memory.check_memory(text, weight_bytes, planned, EngineConfig().ring_slack, target.dtype, device.memory_bytes())
    shared = [text.num_heads // layer.num_kv_heads for layer in text.layers if layer.head_dim <= device.VECTOR_HEAD_DIM]
    costs = RoundCosts(device.widest_block(max(shared)) if shared else None)
    file = CalibrationFile(default_path()) if calibrate else None
    pair = Pair(target, drafter, Tokenizer(folder), context, tuple(notes), costs, file)
    if before_reading is not None:
        before_reading(pair)
    materialize(target, "target", folder)
    if drafter is not None and draft_folder is not None:
        materialize(drafter, "drafter", draft_folder)
    if file is not None:
        choose_dispatch(target, file, EngineConfig().prefill_chunk, kernels=kernels)
        pair.round_costs.restore(file.read(_costs_key(pair)) or {})
    return pair


def _drafter(
    model: str | Path, draft_model: str | Path | None, target: Target, bits: int | None, notes: list[str]
) -> tuple[Path | None, Drafter | None]:
    """The drafter that was asked for and its folder, its weights still lazy; what nobody named has to fit to be it."""
    if draft_model in (None, NO_DRAFTER):
        return None, None
    folder = find_drafter(model) if draft_model == AUTO else local_folder(draft_model)
    guess = published_drafter(model) if folder is None else None
    for found in (folder, guess):
        if found is None:
            continue
        try:
            drafter = load_drafter(found, target.dtype, bits)
            check_pair(target.config, drafter.config, f"{model}", f"{found}")
        except MtpError as error:
            if found is folder:
                raise
            notes.append(f"a drafter by its name, but of no use here: {error}")
        else:
            return found, drafter
    notes.append(f"no drafter found for {model}: decoding without one (--draft-model names one)")
    return None, None


def remember(pair: Pair) -> None:
    """Keeps what rounds were measured to take for the next process, where it is news."""
    if pair.calibration is None or sys.is_finalizing():  # a generator that nobody closed ends with the interpreter
        return
    key, measured = _costs_key(pair), pair.round_costs.to_json()
    known = readable(pair.calibration.read(key) or {})
    is_news = any(abs(seconds / known.get(rows, {}).get(k, math.inf) - 1) > NEWS
                  for rows, by_k in measured.items() for k, seconds in by_k.items())
    if is_news:
        merged = {rows: {**known.get(rows, {}), **by_k} for rows, by_k in measured.items()}
        pair.calibration.write(key, {**known, **merged})


def _costs_key(pair: Pair) -> str:
    """All that the costs of rounds depend on, as far as it can be told from here."""
    sizes = [0 if model is None else _nbytes(model) for model in (pair.target, pair.drafter)]
    text = pair.target.config.text
    plans = {str(module.plan.steps) for module in pair.target.modules() if isinstance(module, SwitchGLU)}
    return (f"rounds: {machine()}, {len(text.layers)} layers of {text.hidden_size}, {pair.target.dtype}, {sizes[0]} "
            f"bytes, drafter {sizes[1]} bytes{''.join(f', experts {plan}' for plan in sorted(plans))}")


@overload
def generate(pair: Pair, prompt: str, **settings: Any) -> Result: ...
@overload
def generate(pair: Pair, prompt: Sequence[int] | Sequence[Prompt], **settings: Any) -> Result | list[Result]: ...
def generate(pair: Pair, prompt: Prompt | Sequence[Prompt], **settings: Any) -> Result | list[Result]:
    """Completes a prompt, or a list of prompts as one batch: one result, or a list in the prompts' order.

    prompt: text as it stands (for a conversation see `Tokenizer.encode_chat`), or token ids.
    settings: the fields of SamplingParams; `sampling`: a SamplingParams for all rows, or a list with one for each;
    `num_draft_tokens`: drafts a round, 0 for plain decoding, "auto" for what is fastest; `max_rows`: prompts decoded
    together, the others follow as rows come free. Neither changes the text.
    Raises RequestError for an empty or too long prompt and for unknown or impossible settings, MemoryBudgetError for
    a prompt that the device cannot hold beside the weights.
    """
    results: dict[int, Result] = {}
    for segment in stream_generate(pair, prompt, **settings):
        if segment.result is not None:
            results[segment.index] = segment.result
    return [results[i] for i in sorted(results)] if is_batch(prompt) else results[0]


def stream_generate(
    pair: Pair, prompt: Prompt | Sequence[Prompt], *, on_prefill: Callable[[int, int], None] | None = None,
    **settings: Any,
) -> Iterator[Segment]:
    """Like `generate`, but yields segments as they come; each row's last one carries its result.

    on_prefill(done, total) is told of the prompt tokens run so far.
    """
    engine, requests = _requests(pair, prompt, settings)
    return stream_requests(pair, engine, requests, on_prefill)


def check(pair: Pair, prompt: Prompt | Sequence[Prompt], **settings: Any) -> None:
    """Raises the error that `generate` would raise for these arguments; runs nothing and reads no weight."""
    _requests(pair, prompt, settings)


def new_engine(pair: Pair, **settings: Any) -> Engine:
    """What runs requests of this pair: submit them from any thread, step on one. Reads no weight.

    settings: the fields of EngineConfig, such as max_rows. Raises RequestError for unknown or impossible ones.
    """
    known = [field.name for field in fields(EngineConfig)]
    for name in settings:
        if name not in known:
            raise RequestError(f"unknown engine setting {name!r}; expected one of {', '.join(known)}")
    return Engine(pair.target, pair.drafter, EngineConfig(**settings), pair.round_costs)


def new_request(pair: Pair, prompt: Prompt, sampling: SamplingParams) -> Request:
    """One prompt, ready to be run. Raises RequestError for an empty or too long prompt.

    An engine knows tokens, not text: stop strings are the business of `stream_requests`, or of who steps the engine.
    """
    if not isinstance(sampling, SamplingParams):
        raise RequestError(f"sampling is {reprlib.repr(sampling)}; expected a SamplingParams")
    tokens = tokens_of(prompt, pair.tokenizer, pair.target.config.text.vocab_size)
    _check_length(pair, len(tokens), answer=1)
    return Request(tokens, sampling, pair.tokenizer.stop_tokens, pair.max_context)


def stream_requests(
    pair: Pair, engine: Engine, requests: Iterable[Request], on_prefill: Callable[[int, int], None] | None = None
) -> Iterator[Segment]:
    """Runs requests, each taken when a row comes free and dropped when it ends: a long job holds only those that run.

    Segments are numbered in the order in which requests are taken; what comes of one request comes in order.
    """
    running: dict[Request, tuple[int, TextStream]] = {}

    def taken() -> Iterator[Request]:
        for index, request in enumerate(requests):
            running[request] = index, pair.tokenizer.stream(request.sampling.stop)
            yield request

    mx.reset_peak_memory()
    try:
        for event in engine.run(taken(), on_prefill):
            request = event.request
            index, stream = running[request]
            text = stream.add(event.tokens)
            if request.is_finished:
                text += stream.finish()
            tokens = event.tokens
            if stream.is_stopped:
                surplus = request.stop_after(stream.num_tokens)
                tokens = tokens[: len(tokens) - surplus]
            if request.finish_reason is None:
                yield Segment(index, text, tokens)
                continue
            del running[request]
            stats = request.stats(mx.get_peak_memory() / memory.GB, engine.plain_seconds(request))
            yield Segment(index, text, tokens, Result(stream.text, request.tokens, request.finish_reason, stats))
    finally:
        remember(pair)


def score(pair: Pair, tokens: Prompt, *, chunk: int = 512) -> mx.array:
    """The target's logits for every position of `tokens`: [L, V] float32, row i scoring what follows token i.

    tokens: ids, or text, which is encoded as a prompt is. chunk: tokens a pass; smaller ones need less memory.
    Raises RequestError for what is no prompt, for more tokens than `pair.max_context` and for a chunk below 1.
    """
    ids = tokens_of(tokens, pair.tokenizer, pair.target.config.text.vocab_size)
    _check_length(pair, len(ids))
    if not is_whole(chunk) or chunk < 1:
        raise RequestError(f"chunk is {chunk!r}; expected a whole number of at least 1")
    text = pair.target.config.text
    cache = KVCache(layer_shapes(text), text.window, 1, 1, pair.target.dtype, len(ids))
    rows = []
    for start in range(0, len(ids), chunk):
        piece = mx.array([ids[start : start + chunk]], mx.int32)
        count = mx.array([piece.shape[1]], mx.int32)
        hidden = pair.target(piece, cache.stage(piece.shape[1], count))
        cache.commit(count, piece.shape[1])
        rows.append(pair.target.logits(hidden)[0].astype(mx.float32))
        mx.eval(rows[-1], *cache.arrays)
        device.release_unused()
    return mx.concatenate(rows)


def _requests(
    pair: Pair, prompt: Prompt | Sequence[Prompt], settings: dict[str, Any]
) -> tuple[Engine, list[Request]]:
    prompts: list[Any] = list(prompt) if is_batch(prompt) else [prompt]
    sampling, changes = _settings(len(prompts), settings)
    EngineConfig(**changes)  # complains of a setting before the pair is looked at
    requests = [new_request(pair, one, params) for one, params in zip(prompts, sampling, strict=True)]
    if len(requests) == 1:
        changes["prefix_tokens"] = 0  # nothing will begin like it
    engine = new_engine(pair, **changes)
    for request in requests:
        engine.check(request)
    return engine, requests


def _settings(rows: int, given: dict[str, Any]) -> tuple[list[SamplingParams], dict[str, Any]]:
    """Each row's sampling, and what differs from EngineConfig's defaults."""
    names = {field.name for field in fields(SamplingParams)}
    known = sorted(names | {"sampling", *ENGINE_SETTINGS})
    for name in sorted(set(given) - set(known)):
        likely = difflib.get_close_matches(name, known, 1, cutoff=0.52)
        raise RequestError(f"unknown setting {name!r}; " + (f"did you mean {likely[0]}? " if likely else "")
                           + f"expected one of {', '.join(known)}")
    base = given.get("sampling", SamplingParams())
    per_row = [base] * rows if isinstance(base, SamplingParams) else base
    if not is_list(per_row) or not all(isinstance(params, SamplingParams) for params in per_row):
        raise RequestError(f"sampling is {reprlib.repr(base)}; expected a SamplingParams, or a list with one for each "
                           "prompt")
    if len(per_row) != rows:
        raise RequestError(f"sampling has {len(per_row)} entries for {rows} prompts; expected one for each")
    changes = {name: value for name, value in given.items() if name in names}
    engine = {name: given[name] for name in ENGINE_SETTINGS if given.get(name) is not None}
    return [replace(params, **changes) for params in per_row], engine


def _check_length(pair: Pair, length: int, answer: int = 0) -> None:
    """Raises RequestError if the context does not hold so many tokens and `answer` more; says whose limit that is."""
    own = pair.target.config.text.max_context
    if length + answer <= pair.max_context:
        return
    included = ", the answer included" if answer else ""
    if length + answer <= own:
        raise RequestError(f"the prompt has {length} tokens; max_context (--max-context) was set to {pair.max_context}"
                           f"{included}: shorten the prompt or raise that limit")
    raise RequestError(f"the prompt has {length} tokens; the model's context holds {own}{included}: shorten the "
                       "prompt")


def _check_arguments(model: object, draft_model: object, max_context: object, dtype: object) -> None:
    """Raises RequestError for what can be no name of a checkpoint, no context and no type of weights."""
    for what, name in (("model", model), ("draft model", draft_model)):
        if not isinstance(name, str | Path | None):
            raise RequestError(f"the {what} is {reprlib.repr(name)}; expected a folder or a Hub name (owner/name)")
        if name is not None and not str(name).strip():  # as a path it would be the working directory
            raise RequestError(f"the {what}'s name is empty: expected a folder or a Hub name (owner/name)")
    if max_context is not None and (not is_whole(max_context) or max_context < 2):
        raise RequestError(f"max_context is {max_context!r}; expected at least 2: a prompt and an answer")
    if dtype is not None and dtype not in (mx.float32, mx.float16, mx.bfloat16):
        raise RequestError(f"dtype is {dtype!r}; expected mx.float32, mx.float16 or mx.bfloat16")


def _nbytes(model: Target | Drafter) -> int:
    return sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())
