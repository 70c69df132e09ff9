"""What a prompt may be in Python: text, or token ids, of Python, NumPy or MLX; or a list of such prompts."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeGuard

import mlx.core as mx
import numpy as np

from mlx_mtp.errors import RequestError
from mlx_mtp.tokenizer import Tokenizer


def is_batch(prompt: object) -> bool:
    """Whether this is a list of prompts: some part of it is text or a list, not a token id."""
    prompt = plain(prompt)
    return is_list(prompt) and any(isinstance(part, str) or is_list(plain(part)) for part in prompt)


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """NumPy's and mlx's arrays and numbers as Python's."""
    return value.tolist() if isinstance(value, mx.array | np.ndarray | np.generic) else value


def tokens_of(prompt: object, tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """The ids of one prompt. Raises RequestError for what is neither text nor ids of the vocabulary."""
    prompt = plain(prompt)
    if isinstance(prompt, Mapping) or (is_list(prompt) and any(isinstance(part, Mapping) for part in prompt)):
        raise RequestError("the prompt is a conversation; expected text or token ids: pass "
                           "pair.tokenizer.encode_chat(messages)")
    if not isinstance(prompt, str) and not is_list(prompt):
        raise RequestError(f"a prompt is {reprlib.repr(prompt)}; expected text or a list of token ids, or a list of "
                           "such prompts")
    if not prompt:
        raise RequestError("the prompt is empty: expected text or at least one token id")
    tokens = tokenizer.encode(prompt) if isinstance(prompt, str) else [plain(part) for part in prompt]
    for token in tokens:
        if not is_whole(token):
            raise RequestError(f"the prompt holds {reprlib.repr(token)}; expected token ids, which are whole numbers")
        if not 0 <= token < vocab_size:
            raise RequestError(f"the prompt holds token {token}; expected ids from 0 to {vocab_size - 1}")
    return [int(token) for token in tokens]
