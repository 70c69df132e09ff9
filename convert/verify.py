"""Verifying a conversion: everything is read again from disk and compared with the source. See `convert.report`.

    tensors    every module's error, by class (`tensor_errors`)
    text       perplexity, KL and agreement on a bundled text (`teacher_forced`)
    drafting   mean acceptance length before and after, with a drafter (`drafting`)
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mtp import demo
from mlx_mtp.checkpoint.loader import parse_config, read_json
from mlx_mtp.config import TargetConfig, TextConfig
from mlx_mtp.convert.drafting import MAX_TOKENS, Prompts, compare_drafting
from mlx_mtp.convert.report import Report, versions
from mlx_mtp.convert.teacher_forced import Text, compare
from mlx_mtp.convert.tensor_errors import Progress, class_errors, tower_errors
from mlx_mtp.errors import RequestError
from mlx_mtp.tokenizer import Tokenizer

SAMPLE_TEXT = Path(__file__).parent / "sample_text.txt"
MOST_TOKENS = 640  # of the text; Gemma's tokenizer needs fewer
RANDOM_TOKENS, RANDOM_PROMPTS, RANDOM_PROMPT_TOKENS = 200, 8, 12  # where there is no tokenizer
SEED = 0

PROMPTS = (
    "What is a tide, and why are there two of them a day?",
    "Write a Python function that returns the second largest number of a list.",
    "List the months of the year with the number of days each one has.",
    "Explain to a child how a lighthouse helps a ship.",
    "Translate into French: The boats come back before sunrise.",
    "A box holds 24 herrings. How many boxes does one need for 1,000 herrings? Show the calculation.",
    "Write a short letter to a neighbour whose dog barks at night.",
    "Write an SQL query that counts the orders of each customer in 2024.",
)


def no_progress(what: str, done: int, total: int) -> None:
    """Tells nobody."""


def verify(
    source: Path,
    output: Path,
    source_drafter: Path | None = None,
    output_drafter: Path | None = None,
    *,
    prompts: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> Report:
    """Compares a converted checkpoint with its source, both read from disk.

    With both drafters, they are compared too and both pairs decode `prompts` (None: the built-in pairs' held-out ones
    for those, else PROMPTS). The text is SAMPLE_TEXT; without a tokenizer it is random tokens of a fixed seed, and so
    are the prompts. progress(what, done, total) is told how far each step is.

    Raises CheckpointError, ConfigError or PairError for what cannot be compared or loaded.
    """
    begun = time.perf_counter()
    tensors = class_errors(source, output, "target", progress) + tower_errors(source, output, progress)
    if source_drafter is not None and output_drafter is not None:
        tensors += class_errors(source_drafter, output_drafter, "drafter", progress)
    config = parse_config(source, TargetConfig.from_json, read_json(source / "config.json")).text
    tokenizer = _tokenizer(source)
    text = compare(source, output, sample_text(tokenizer, config), progress)
    mx.clear_cache()
    drafting = None
    if source_drafter is not None and output_drafter is not None:
        chosen = sample_prompts(tokenizer, config, source, prompts)
        drafting = compare_drafting((source, source_drafter), (output, output_drafter), chosen, progress)
    return Report(
        source=source.name,
        output=output.name,
        tensors=tensors,
        text=text,
        drafting=drafting,
        device=_device(),
        versions=versions(),
        seconds=time.perf_counter() - begun,
    )


def sample_text(tokenizer: Tokenizer | None, config: TextConfig) -> Text:
    """The bundled text in a checkpoint's own tokens, cut to what its context holds; random without a tokenizer."""
    most = min(MOST_TOKENS, config.max_context)
    if tokenizer is None:
        return Text(_random_tokens(config, (min(RANDOM_TOKENS, most),)).tolist(), _random("tokens"))
    return Text(tokenizer.encode(SAMPLE_TEXT.read_text(encoding="utf-8"))[:most], "the bundled sample text")


def sample_prompts(
    tokenizer: Tokenizer | None, config: TextConfig, source: Path, given: Sequence[str] | None
) -> Prompts:
    """The prompts as token ids, through the chat template if there is one.

    Raises RequestError if one is too long, or if text is given and there is no tokenizer.
    """
    if tokenizer is None:
        if given is not None:
            raise RequestError(f"prompts were given as text, but {source} has no tokenizer: copy its tokenizer.json "
                               "there, or give none")
        shape = RANDOM_PROMPTS, min(RANDOM_PROMPT_TOKENS, config.max_context // 2)
        return Prompts(_random_tokens(config, shape).tolist(), frozenset(), _random("tokens"))
    name = "given ones"
    if given is None:
        is_built_in = source.resolve() in (demo.TARGET.resolve(), demo.MIXTURE_TARGET.resolve())
        given, name = (_held_out(), "the built-in pairs' held-out ones") if is_built_in else (PROMPTS, "bundled ones")
    encoded = [
        tokenizer.encode_chat([{"role": "user", "content": text}]) if tokenizer.has_chat_template
        else tokenizer.encode(text) for text in given
    ]
    if not encoded or max(map(len, encoded)) + MAX_TOKENS > config.max_context:
        raise RequestError(f"expected at least one prompt, and each with at most {config.max_context - MAX_TOKENS} "
                           f"tokens; got {len(encoded)} with up to {max(map(len, encoded), default=0)}")
    return Prompts(encoded, tokenizer.stop_tokens, name)


def _held_out() -> list[str]:
    """The prompts that the built-in pairs were not trained on and that the edge target answers without a loop."""
    raw = json.loads((demo.TARGET.parent / "heldout_prompts.json").read_text(encoding="utf-8"))
    return [entry["prompt"] for entry in raw if entry["stops"]]


def _tokenizer(folder: Path) -> Tokenizer | None:
    """None only if the folder has no tokenizer's files at all; one that cannot be read is an error."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return Tokenizer(folder)


def _random_tokens(config: TextConfig, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(SEED).integers(0, config.vocab_size, shape)


def _random(what: str) -> str:
    return f"random {what} of seed {SEED}, for there is no tokenizer"


def _device() -> str:
    return f"{mx.device_info().get('device_name', 'unknown')}, MLX on {mx.default_device().type.name}"
