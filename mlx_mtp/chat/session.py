"""A loaded pair and one engine for the whole conversation: turns become requests, and only their new tokens are run.

Every prompt is the whole conversation through the chat template, so an answer is that of a fresh run, whatever is
reused. The engine keeps K/V by token ids: what the template rewrites (thoughts that are dropped), or what the tokenizer
splits otherwise than the model wrote it, differs from there on and is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mlx_mtp import api
from mlx_mtp.api import Pair
from mlx_mtp.channels import ChannelParser, Kind, Part
from mlx_mtp.chat.conversation import Conversation
from mlx_mtp.config import SamplingParams
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import FinishReason, Request, RequestStats
from mlx_mtp.errors import MemoryBudgetError, RequestError

BUILT_IN = "built-in"  # the name of the pair that comes with the package
FILLED = 0.8  # of the context, from which on the user is warned
KEPT = 0.75  # of the context, at most, that is left when old turns are left out: dropping again has to be rare
ANSWER_SHARE = 4  # the context is divided by it: room for an answer that is asked for before turns are left out
PROMPT_END = 16  # tokens of a prompt that are looked at for a channel that its template opened


@dataclass(frozen=True)
class Source:
    """What to load, and how: as `api.load` has it."""

    model: str | None = None
    draft_model: str = api.AUTO
    draft_bits: int | None = None
    max_context: int | None = None
    calibrate: bool = True
    kernels: bool = True


@dataclass(frozen=True)
class Answer:
    """What a request gave. calls: what stood between the markers of tool calls. context: tokens in use after it."""

    content: str
    thinking: str
    calls: tuple[str, ...]
    finish_reason: FinishReason
    stats: RequestStats
    context: int

    @property
    def is_stopped(self) -> bool:
        return self.finish_reason == "aborted"

    @property
    def is_nothing(self) -> bool:
        """Whether it was stopped before anything came."""
        return self.is_stopped and not (self.content or self.thinking or self.calls)


class Listener(Protocol):
    """Who watches an answer come."""

    def progress(self, done: int, total: int) -> None:
        """Of the prompt's tokens, so many are in the cache."""

    def add(self, part: Part) -> None:
        """The next piece of text."""


class Session:
    """A pair, and the engine that keeps the K/V of what was said. All of it belongs to the thread that made it."""

    def __init__(self, source: Source, num_draft_tokens: Any, before_reading: Callable[[], object] = lambda: None
                 ) -> None:
        """before_reading is called when no error is left but a file's that cannot be read, and no weight is read yet.

        Raises what `api.load` raises.
        """
        self.source = source
        self.pair: Pair = api.load(**vars(source), before_reading=lambda _: before_reading())
        self.use(num_draft_tokens)

    @property
    def name(self) -> str:
        return self.source.model or BUILT_IN

    def use(self, num_draft_tokens: Any) -> None:
        """Begins with a new engine: the next turn is run from its first token."""
        self._num_draft_tokens = num_draft_tokens
        self._engine = api.new_engine(self.pair, num_draft_tokens=num_draft_tokens, max_rows=1,
                                      prefix_tokens=self.pair.max_context)
        self.context = largest_context(self._engine, self.pair.max_context)

    def encode(self, conversation: Conversation, thinking: bool, tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """What the model gets to see of a conversation. Raises RequestError if the template refuses it."""
        return self.pair.tokenizer.encode_chat(conversation.visible(), thinking=thinking, tools=tools)

    def fit(self, conversation: Conversation, encode: Callable[[], list[int]], max_tokens: int) -> list[int]:
        """The prompt; leaves out oldest turns if it and an answer do not fit into the context.

        Raises RequestError if the newest turn alone does not.
        """
        room = min(max_tokens, self.context // ANSWER_SHARE)
        tokens = encode()
        if len(tokens) + room > self.context:
            while len(tokens) + room > KEPT * self.context and conversation.left_out < len(conversation.turns) - 1:
                conversation.left_out += 1
                tokens = encode()
        if len(tokens) >= self.context:
            raise RequestError(f"the message makes a prompt of {len(tokens)} tokens; the context holds {self.context}, "
                               "the answer included: shorten it")
        return tokens

    def answer(
        self, prompt: list[int], sampling: SamplingParams, listener: Listener, is_stopped: Callable[[], bool]
    ) -> Answer:
        """Runs a prompt to the answer's end, or until `is_stopped`: what came until then is the answer."""
        request = Request(prompt, sampling, self.pair.tokenizer.stop_tokens, self.context, keep_answer=True)
        parser = ChannelParser(self.pair.tokenizer.decode(prompt[-PROMPT_END:]))
        texts = _Texts(listener)
        result = None

        def on_prefill(done: int, total: int) -> None:
            listener.progress(done, total)
            if is_stopped():
                self._engine.abort(request.id)

        try:
            for segment in api.stream_requests(self.pair, self._engine, [request], on_prefill):
                texts.take(parser.add(segment.text))
                result = segment.result
                if is_stopped():
                    self._engine.abort(request.id)
            while not self._engine.is_idle:
                self._engine.step()  # lets the row go, whose answer's K/V are kept by that
        except BaseException:  # came in the middle of a step, maybe: what the engine holds may be half done
            self.use(self._num_draft_tokens)
            raise
        texts.take(parser.finish())
        assert result is not None
        used = len(prompt) + len(result.tokens)
        return Answer(texts.of("answer").strip(), texts.of("thinking").strip(), tuple(texts.calls),
                      result.finish_reason, result.stats, used)


class _Texts:
    """Collects parts by kind, and passes them on."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._parts: list[Part] = []

    def take(self, parts: Sequence[Part]) -> None:
        for part in parts:
            self._parts.append(part)
            self._listener.add(part)

    def of(self, kind: Kind) -> str:
        return "".join(part.text for part in self._parts if part.kind == kind)

    @property
    def calls(self) -> list[str]:
        return [part.text for part in self._parts if part.kind == "tool_call"]


def largest_context(engine: Engine, limit: int) -> int:
    """Tokens of prompt and answer, at most `limit`, that the device holds."""
    def fits(length: int) -> bool:
        try:
            engine.check(Request(range(length - 1), SamplingParams(max_tokens=1), frozenset(), length))
        except MemoryBudgetError:
            return False
        return True

    low, high = 2, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
