"""What the check decodes: code, prose, lists and JSON, short and long, greedy and sampled, from a file or from here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from mlx_mtp import api
from mlx_mtp.api import Pair
from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.engine.request import Request
from mlx_mtp.errors import RequestError
from mlx_mtp.prompts_file import Line, told

SHORT = {
    "prose": "Explain `bisect.insort`.",
    "code": "Write Python: Return the number of items.",
    "list": "List ten rivers of Europe, longest first, one a line, each with its length in kilometres.",
    "json": "Give three books as a JSON array of objects with the keys title, author and year, and nothing else.",
    "longer prose": "Why is the sky blue at noon and red in the evening? Answer in two short paragraphs, the first for "
                    "a child of eight, the second for a student of physics who has not yet met scattering.",
    "longer code": "Write Python: Merge two sorted lists.\n\n```python\ndef merge(left, right):\n    result = []\n"
                   "    while left and right:\n",
}
NOTE = "Note {}: at {}:{:02} the water stood {} cm above the mark, the wind came from the {}, and {} boats went out."
WINDS = ("north", "west", "south-west", "east")

# For the draws at a temperature above 0, in turn; the second is what Gemma's makers recommend.
FILTERS = (SamplingParams(), SamplingParams(top_k=64, top_p=0.95), SamplingParams(min_p=0.05))


@dataclass(frozen=True)
class Case:
    """One request of every cell of the sweep. name: what it is called in the report."""

    name: str
    tokens: tuple[int, ...]
    sampling: SamplingParams

    def request(self, pair: Pair) -> Request:
        """A new one. Raises RequestError if the context cannot hold it."""
        return api.new_request(pair, list(self.tokens), self.sampling)


def bundled_cases(
    pair: Pair, temperatures: Sequence[float], max_tokens: int, note: Callable[[str], None]
) -> list[Case]:
    """The cases of the prompts above; `note` is told of those that do not fit the context.

    Two more are made to measure: one crosses the end of the window while its answer comes, so that the sliding layers
    begin to forget; the other is so long that their rings have wrapped before.
    """
    window = pair.target.config.text.window
    prompts = [(name, encoded(pair, text)) for name, text in SHORT.items()]
    prompts.append(("to the window", _notes(pair, window - max_tokens // 2)))
    prompts.append(("beyond the window", _notes(pair, window + EngineConfig().ring_slack + 1)))
    fitting = [(name, tokens) for name, tokens in prompts if len(tokens) + max_tokens <= pair.max_context]
    for name, tokens in prompts:
        if len(tokens) + max_tokens > pair.max_context:
            note(f"left out the prompt {name!r}: its {len(tokens)} tokens and an answer of {max_tokens} are more than "
                 f"the context's {pair.max_context}")
    if not fitting:
        raise RequestError(f"no prompt of the check fits the context of {pair.max_context} tokens with an answer of "
                           f"{max_tokens}: lower --max-tokens, or give short prompts (--prompts-file)")
    return [case for temperature in temperatures for case in _sampled(fitting, temperature, max_tokens)]


def file_cases(
    pair: Pair, lines: Iterable[Line], temperatures: Sequence[float], defaults: SamplingParams
) -> list[Case]:
    """The cases of a prompts file: a line with settings of its own is decoded with these, the others as above."""
    swept, cases = [], []
    for line in lines:
        name = line.where if line.id is None else str(line.id)
        with told(line.where):
            if line.sampling.stop:
                raise RequestError("has stop strings, which end a text behind its tokens' back: leave them out")
            tokens = encoded(pair, line.prompt)
            api.new_request(pair, list(tokens), line.sampling)
        if line.sampling == defaults:
            swept.append((name, tokens))
        else:
            cases.append(Case(name, tokens, line.sampling))
    return [case for temperature in temperatures
            for case in _sampled(swept, temperature, defaults.max_tokens)] + cases


def encoded(pair: Pair, prompt: str | Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
    """Token ids, through the chat template; text as it stands where a checkpoint has none."""
    if not isinstance(prompt, str):
        return tuple(pair.tokenizer.encode_chat(prompt))
    if not pair.tokenizer.has_chat_template:
        return tuple(pair.tokenizer.encode(prompt))
    return tuple(pair.tokenizer.encode_chat([{"role": "user", "content": prompt}]))


def _notes(pair: Pair, least: int) -> tuple[int, ...]:
    """A prompt of at least so many tokens, and not a line more."""
    text = "Summarize these notes in one sentence."
    for day in count(1):
        tokens = encoded(pair, text)
        if len(tokens) >= least:
            return tokens
        text += "\n" + NOTE.format(day, day % 24, day * 7 % 60, 20 + day * 13 % 90, WINDS[day % len(WINDS)], day % 11)
    raise AssertionError  # pragma: no cover


def _sampled(
    prompts: Sequence[tuple[str, tuple[int, ...]]], temperature: float, max_tokens: int
) -> Iterator[Case]:
    for index, (name, tokens) in enumerate(prompts):
        filters = FILTERS[index % len(FILTERS) if temperature else 0]
        yield Case(name, tokens, replace(filters, max_tokens=max_tokens, temperature=temperature, seed=index))
