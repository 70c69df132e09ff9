"""The prompts that the bench decodes: eight of each kind, and random ones.

Ordinary ones ask a real model for long answers. The built-in pair, which knows only the form of such answers, writes at
least 36 tokens for each; they were chosen by that length, never by acceptance.
"""

from __future__ import annotations

import numpy as np

from mlx_mtp import Pair
from mlx_mtp.errors import RequestError

KINDS: dict[str, tuple[str, ...]] = {
    "code": (
        "Write Python: Return the number of words in a text.",
        "Write Python: Parse a line of comma separated values into a dictionary.",
        "Write Python: Read a file and return its lines without blank ones.",
        "Write Python: A class that keeps the last values it was given, up to a size.",
        "Write Python: Walk a folder and add up the sizes of its files.",
        "Write Python: Return the longest common prefix of a list of strings.",
        "Write Python: Retry a function that raises, with growing pauses.",
        "Write Python: Count how often each letter comes in a string.",
    ),
    "prose": (
        "Explain `functools.lru_cache`.",
        "What is `weakref.WeakValueDictionary`?",
        "Explain `queue.PriorityQueue`.",
        "What is `types.SimpleNamespace`?",
        "Explain why floating point numbers are rounded.",
        "Tell the story of a lighthouse keeper who repairs a radio.",
        "Tell the story of a clockmaker who loses a minute every day.",
        "Describe a harbour at dawn in one long paragraph.",
    ),
    "list": (
        "List the months of the year with their numbers of days, one a line.",
        "List twenty methods of a string and what each returns.",
        "List the numbers from 1 to 40 with their squares, one a line.",
        "List the exceptions that opening a file can raise.",
        "List the planets with their distance from the sun, one a line.",
        "List the steps of making bread, one a line.",
        "List fifteen modules of the standard library, each with a line on its use.",
        "List the letters of the alphabet with a word for each.",
    ),
    "json": (
        "Write a JSON object that describes a book, with title, authors, year and chapters.",
        "Write a JSON array of ten people with name, age and city.",
        "Write a JSON object with the settings of a logger: handlers, formatters and levels.",
        "Write a JSON array of the days of the week, each with its number and name.",
        "Write a JSON schema of a request with a prompt and sampling settings.",
        "Write a JSON object that maps ten countries to their capitals.",
        "Write a JSON array of eight measurements with time, value and unit.",
        "Write a JSON object with the configuration of a small web server.",
    ),
}
# Token ids drawn at random, for models whose text means nothing: of one length, or of lengths from 8 tokens up.
RANDOM, RAGGED = "random", "ragged"
ALL_KINDS = (*KINDS, RANDOM, RAGGED)
RANDOM_LENGTH = 48  # where no context length is asked for
SHORTEST = 8
BOS = 2

FILLER = (
    "The notes below were taken in no order. A program spends most of its time waiting: for a disk, for a line, for a "
    "person, and above all for memory, which answers a hundred times more slowly than the arithmetic can ask. What is "
    "read once should therefore be used often, and what is near should be kept near. A list is read from its start, a "
    "table at any place, a tree from its root; each pays for what it makes easy with what it makes hard. Names are "
    "read more often than they are written. A test that cannot fail says nothing. The first measurement is of the "
    "clock, the second of the machine that was not quiet, and only the third of what was asked. "
)


def prompts(pair: Pair, kind: str, rows: int, context: int) -> list[list[int]]:
    """Token ids of `rows` prompts, the shortest first; there are eight of a kind, after which they come again.

    context: tokens that each should have, by text put before the question; 0 leaves it as it is. Chat templates and
    the joints of text make the length exact to a few tokens only.
    """
    if kind in (RANDOM, RAGGED):
        return random_prompts(kind, rows, context or RANDOM_LENGTH)
    texts = [KINDS[kind][i % len(KINDS[kind])] for i in range(rows)]
    return sorted((_lengthened(pair, text, context) for text in texts), key=len)


def random_prompts(kind: str, rows: int, length: int, seed: int = 7) -> list[list[int]]:
    """Ids from 3 to 999 after <bos>. The longest of ragged ones has `length` tokens."""
    generator = np.random.default_rng(seed)
    lengths = np.linspace(SHORTEST, length, rows).astype(int) if kind == RAGGED and rows > 1 else [length] * rows
    return [[BOS, *generator.integers(3, 1000, one - 1).tolist()] for one in lengths]


def _lengthened(pair: Pair, text: str, context: int) -> list[int]:
    tokens = _chat(pair, text)
    missing = context - len(tokens)
    if context and missing < 0:
        raise RequestError(f"a context of {context} tokens was asked for, but {text!r} alone has {len(tokens)}: give "
                           "0, which adds nothing, or more")
    if missing <= 0:
        return tokens
    one = pair.tokenizer.encode(FILLER)[1:]  # without <bos>
    filler = (one * (missing // len(one) + 1))[:missing]
    return _chat(pair, f"{pair.tokenizer.decode(filler)}\n{text}")


def _chat(pair: Pair, text: str) -> list[int]:
    if not pair.tokenizer.has_chat_template:
        return pair.tokenizer.encode(text)
    return pair.tokenizer.encode_chat([{"role": "user", "content": text}])
