"""The command `python -m mlx_mtp.generate`: a prompt in, text streamed out, a summary at the end.

Text goes to stdout and everything else to stderr, so that the output can be piped.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import types
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, NoReturn

from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.errors import MtpError, RequestError

if TYPE_CHECKING:
    from mlx_mtp.api import Pair, Result

USER_ERROR = 2
INTERRUPTED = 128 + 2  # as shells count: 128 + the signal's number, here SIGINT
BROKEN_PIPE = 128 + 13  # SIGPIPE


def parser() -> argparse.ArgumentParser:
    """The flags, named as in mlx-lm; every default comes from the dataclass that owns it."""
    sampling, engine = SamplingParams(), EngineConfig()
    cli = _Parser(
        prog="python -m mlx_mtp.generate",
        description="Generate text with Gemma 4, drafted by its MTP drafter: the same text, sooner.",
    )
    add = cli.add_argument
    add("--model", help="checkpoint folder or Hub name (default: the small built-in demonstration pair)")
    add("--draft-model", default="auto", help="drafter's folder or Hub name, or 'none' (default: auto, which looks "
                                             "for <model>-assistant)")
    add("--draft-bits", type=int, help="quantize the drafter to so many bits while loading")
    add("--max-context", type=int, help="tokens of prompt and answer together to plan memory for")
    add("--prompt", "-p", action="append", help="the prompt; - reads stdin; repeat it to decode several as one batch")
    add("--system-prompt", help="instructions put before the prompt by the chat template")
    add("--ignore-chat-template", action="store_true", help="take the prompt as plain text")
    add("--max-tokens", "-m", type=int, default=sampling.max_tokens, help="default: %(default)s")
    add("--temp", type=float, default=sampling.temperature, help="temperature; 0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=sampling.top_p, help="default: %(default)s")
    add("--top-k", type=int, default=sampling.top_k, help="0 keeps all tokens (default: %(default)s)")
    add("--min-p", type=float, default=sampling.min_p, help="default: %(default)s")
    add("--seed", type=int, default=sampling.seed, help="same prompt, settings and seed: same text (default: "
                                                        "%(default)s)")
    add("--num-draft-tokens", type=int, default=engine.num_draft_tokens,
        help="drafts a round; 0 is plain decoding; never changes the text (default: %(default)s)")
    add("--verbose", type=_flag, default=True, metavar="T|F", help="notes, progress and summary (default: T)")
    add("--json", action="store_true", help="print one JSON object a completion instead of its text")
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    args = parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an encoding that lacks a letter must not end the answer
    try:
        return _run(args)
    except MtpError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return USER_ERROR
    except BrokenPipeError:  # the reader (`| head`) has enough; nothing may be flushed into the pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED


def _run(args: argparse.Namespace) -> int:
    sampling = SamplingParams(args.max_tokens, args.temp, args.top_k, args.top_p, args.min_p, args.seed)
    EngineConfig(num_draft_tokens=args.num_draft_tokens)  # complains before anything is loaded
    texts = _prompts(args.prompt)

    from mlx_mtp import api  # here, since --help and bad flags need no models

    progress = Progress(args.verbose)
    progress.show(f"loading {args.model or 'the built-in pair'}")
    prompts: list[list[int]] = []

    def encode(pair: Pair) -> None:
        prompts.extend(_tokens(pair, text, args) for text in texts)
        api.check(pair, prompts, sampling=sampling, num_draft_tokens=args.num_draft_tokens)

    try:
        pair = api.load(args.model, args.draft_model, draft_bits=args.draft_bits, max_context=args.max_context,
                        before_reading=encode)
    finally:
        progress.clear()
    for note in pair.notes if args.verbose else ():
        print(note, file=sys.stderr)
    return _stream(pair, prompts, sampling, args, progress)


def _stream(pair: Pair, prompts: list[list[int]], sampling: SamplingParams, args: argparse.Namespace,
            progress: Progress) -> int:
    """Decodes the prompts as one batch; a single one is printed as it comes, several in order as they finish."""
    from mlx_mtp import api

    results: dict[int, Result] = {}
    printed = 0
    partial = [""] * len(prompts)
    tokens: list[list[int]] = [[] for _ in prompts]
    live = len(prompts) == 1 and not args.json

    def show(i: int) -> None:
        if args.json:
            _print_json(results.get(i), partial[i], tokens[i])
            return
        if len(prompts) > 1 and args.verbose:
            print(f"--- {i + 1}", file=sys.stderr, flush=True)
        print(results[i].text if i in results else partial[i], flush=True)

    try:
        for segment in api.stream_generate(
            pair, prompts, sampling=sampling, num_draft_tokens=args.num_draft_tokens,
            on_prefill=lambda done, total: progress.show(f"prompt {done}/{total}"),
        ):
            progress.clear()
            partial[segment.index] += segment.text
            tokens[segment.index] += segment.tokens
            if live:
                print(segment.text, end="", flush=True)
            if segment.result is not None:
                results[segment.index] = segment.result
            while printed in results and not live:
                show(printed)
                printed += 1
    except KeyboardInterrupt:
        progress.clear()
        for i in range(printed, len(prompts) if not live else 0):
            show(i)
        raise
    if live:
        print(flush=True)
    if args.verbose:
        _summarize([results[i] for i in sorted(results)])
    return 0


def _print_json(result: Result | None, text: str, tokens: list[int]) -> None:
    """One line for a completion: the finished result, else what had come of it when it was interrupted."""
    shown: dict[str, Any] = {"text": text, "tokens": tokens, "finish_reason": "interrupted", "stats": None}
    if result is not None:
        shown = {field.name: getattr(result, field.name) for field in fields(result)} | {"stats": asdict(result.stats)}
    print(json.dumps(shown), flush=True)


def _summarize(results: list[Result]) -> None:
    """A line a completion: sizes, speeds, and what the drafter gave."""
    for result in results:
        stats = result.stats
        line = (f"[prompt {stats.prompt_tokens} tokens, {stats.prompt_tps:.0f} tok/s; answer {stats.generation_tokens} "
                f"tokens, {stats.generation_tps:.1f} tok/s; finished: {result.finish_reason}")
        if stats.drafted:
            line += (f"; accepted {stats.accepted} of {stats.drafted} drafts, {stats.mean_acceptance_length:.2f} "
                     "tokens a round")
        print(f"{line}; peak memory {stats.peak_memory:.2f} GB]", file=sys.stderr)


def _prompts(given: list[str] | None) -> list[str]:
    if given is None and sys.stdin.isatty():
        raise RequestError("no prompt given: pass --prompt, or --prompt - to read stdin")
    if given is not None and given.count("-") > 1:
        raise RequestError("--prompt - is given twice, but stdin can be read only once: give the others as text")
    texts = [_stdin() if prompt == "-" else prompt for prompt in given or ["-"]]
    for text in texts:
        if not text.strip():
            raise RequestError("the prompt is empty: expected some text")
    return texts


def _stdin() -> str:
    try:
        text = sys.stdin.read()
        text.encode("utf-8")  # in the C locale, bytes that cannot be decoded come as lone surrogates
    except UnicodeError as error:
        raise RequestError(f"what came on stdin is not text in {sys.stdin.encoding}: convert it to that, or set "
                           "PYTHONIOENCODING to the encoding it is in") from error
    return text


def _tokens(pair: Pair, text: str, args: argparse.Namespace) -> list[int]:
    if args.ignore_chat_template:
        return pair.tokenizer.encode(text if args.system_prompt is None else f"{args.system_prompt}\n{text}")
    system = [] if args.system_prompt is None else [{"role": "system", "content": args.system_prompt}]
    return pair.tokenizer.encode_chat([*system, {"role": "user", "content": text}])


class _Parser(argparse.ArgumentParser):
    """Complains like everything else here: in one line that begins with "error:"."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"error: {message}; see --help\n")


def _flag(text: str) -> bool:
    if text.lower() not in ("t", "true", "f", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected T or F")
    return text.lower() in ("t", "true")


class Progress:
    """One line on a terminal's stderr that is overwritten and goes away; nothing where there is no terminal."""

    def __init__(self, is_wanted: bool) -> None:
        self._is_wanted = is_wanted and sys.stderr.isatty()
        self._width = 0

    def show(self, text: str) -> None:
        if self._is_wanted:
            print(f"\r{text}…".ljust(self._width), end="", file=sys.stderr, flush=True)
            self._width = len(text) + 2

    def clear(self) -> None:
        if self._width:
            print("\r" + " " * self._width + "\r", end="", file=sys.stderr, flush=True)
            self._width = 0


class _CallableModule(types.ModuleType):
    """This module shares its name with the function `mlx_mtp.generate`; importing it must not hide that."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from mlx_mtp import api

        return api.generate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
