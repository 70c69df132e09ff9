"""The command `python -m mlx_mtp.generate`: a prompt in, text streamed out; or many in, a file of answers out.

Text goes to stdout and everything else to stderr, so that the output can be piped.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_mtp import api, batch, prompts_file
from mlx_mtp.api import Pair, Result
from mlx_mtp.batch import Job
from mlx_mtp.command import Parser, check_output, guarded, num_draft_tokens
from mlx_mtp.config import AUTO, EngineConfig, SamplingParams
from mlx_mtp.errors import RequestError
from mlx_mtp.output_file import OutputFile
from mlx_mtp.progress import Progress
from mlx_mtp.prompts_file import Line


def parser() -> argparse.ArgumentParser:
    """The flags, named as in mlx-lm; every default comes from the dataclass that owns it."""
    sampling, engine = SamplingParams(), EngineConfig()
    cli = Parser(
        prog="python -m mlx_mtp.generate",
        description="Generate text with Gemma 4, drafted by its MTP drafter: the same text, sooner.",
    )
    add = cli.add_argument
    add("--model", help="checkpoint folder or Hub name (default: the small built-in demonstration pair)")
    add("--draft-model", default="auto", help="drafter's folder or Hub name, or 'none' (default: auto, which looks "
                                             "for <model>-assistant)")
    add("--draft-bits", type=int, help="quantize the drafter to this many bits while loading")
    add("--max-context", type=int, help="limit of prompt and answer together, in tokens; memory is planned for it "
                                        "(default: the model's own)")
    given = cli.add_mutually_exclusive_group().add_argument
    given("--prompt", "-p", action="append", help="the prompt; - reads stdin; repeat it to decode several as one batch")
    given("--prompts-file", metavar="FILE",
          help="many prompts, one a line; - reads stdin. JSON lines if the file is named *.jsonl or its first line is "
               f"a JSON object: {prompts_file.FORM}, with an id and settings of its own if need be "
               f"({', '.join(prompts_file.SETTINGS)}). Else each line is a prompt as it stands. Blank ones are skipped")
    add("--output", type=Path, metavar="FILE",
        help="with --prompts-file: write JSON lines there, in the prompts' order, as answers finish. A job that was "
             "stopped goes on after the last line when the same command is given again")
    add("--max-rows", type=int, default=engine.max_rows,
        help="prompts decoded together; never changes the text (default: %(default)s)")
    add("--system-prompt", help="instructions put before the prompt by the chat template")
    add("--ignore-chat-template", action="store_true", help="take the prompt as plain text")
    add("--max-tokens", "-m", type=int, default=sampling.max_tokens, help="default: %(default)s")
    add("--temp", type=float, default=sampling.temperature, help="temperature; 0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=sampling.top_p, help="default: %(default)s")
    add("--top-k", type=int, default=sampling.top_k, help="0 keeps all tokens (default: %(default)s)")
    add("--min-p", type=float, default=sampling.min_p, help="default: %(default)s")
    add("--seed", type=int, default=sampling.seed, help="same prompt, settings and seed: same text (default: "
                                                        "%(default)s)")
    add("--num-draft-tokens", type=num_draft_tokens, default=engine.num_draft_tokens, metavar="K",
        help=f"drafts a round; 0 is plain decoding, {AUTO} takes what is measured to be fastest; never changes the "
             "text (default: %(default)s)")
    add("--no-calibration", action="store_true", help="measure nothing and keep nothing about this machine's speed")
    add("--no-kernels", action="store_true", help="run MLX's own operations only, no GPU kernels of this package")
    add("--verbose", type=_flag, default=True, metavar="T|F", help="notes, progress and summary (default: T)")
    add("--json", action="store_true", help="print one JSON object per completion and line, instead of its text")
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or what `guarded` says."""
    args = parser().parse_args(arguments)
    return guarded(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    sampling = SamplingParams(args.max_tokens, args.temp, args.top_k, args.top_p, args.min_p, args.seed)
    EngineConfig(num_draft_tokens=args.num_draft_tokens, max_rows=args.max_rows)  # complains before anything is loaded
    if args.output is not None and args.prompts_file is None:
        raise RequestError("--output is given without --prompts-file: give the prompts as a file, or redirect stdout")
    if args.output is not None:
        check_output(args.output, args.prompts_file)
    work = _Work(args, _lines(args, sampling))
    try:
        pair = api.load(args.model, args.draft_model, draft_bits=args.draft_bits, max_context=args.max_context,
                        before_reading=work.prepare, calibrate=not args.no_calibration, kernels=not args.no_kernels)
        work.run(pair)
    except _NothingLeftError as reason:
        work.note(str(reason))
    finally:
        work.close()
    return 0


class _NothingLeftError(Exception):
    """Ends the loading before weights are read: every answer is there already."""


class _Work:
    """What one call of the command has to do: prompts are checked while the models load, then run."""

    def __init__(self, args: argparse.Namespace, lines: Sequence[Line]) -> None:
        self._args, self._lines = args, lines
        self._progress = Progress(args.verbose)
        self._progress.show(f"loading {args.model or 'the built-in pair'}")
        self._jobs: list[Job] = []
        self._output: OutputFile | None = None

    def prepare(self, pair: Pair) -> None:
        """Raises what is wrong with any prompt or with the output file, and _NothingLeftError if that is complete."""
        args = self._args
        prefix_tokens = EngineConfig.prefix_tokens if len(self._lines) > 1 else 0
        self._engine = api.new_engine(pair, num_draft_tokens=args.num_draft_tokens, max_rows=args.max_rows,
                                      prefix_tokens=prefix_tokens)
        self._jobs = batch.jobs(pair, self._engine, self._lines, lambda line: _tokens(pair, line.prompt, args),
                                batch.model_name(args.model))
        self._lines = ()
        if args.output is not None:
            self._output = OutputFile(args.output, [job.fingerprint for job in self._jobs])
            if self._output.done == len(self._jobs):
                raise _NothingLeftError(f"{args.output} holds all {self._output.done} answers: nothing is left to do")

    def run(self, pair: Pair) -> None:
        """A single prompt is printed as it comes; several are printed, or written, in order as they finish."""
        args = self._args
        self._progress.clear()
        for text in pair.notes:
            self.note(text)
        if args.prompts_file is None and len(self._jobs) == 1 and not args.json:
            result = self._stream(pair)
            self.note(batch.summary(result))
            return
        if self._output is None:
            totals = batch.run(pair, self._engine, self._jobs, self._printer(), self._progress)
        else:
            totals = self._write(pair, self._output)
        self._progress.clear()
        self.note(f"[{totals}]")

    def note(self, text: str) -> None:
        """What a user may want to know, unless they want to hear nothing."""
        if self._args.verbose:
            self._progress.clear()
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self._progress.clear()
        if self._output is not None:
            self._output.close()

    def _printer(self) -> batch.Sink:
        if self._args.json:
            return batch.JsonLines(self._progress, None if self._args.prompts_file is None else self._jobs)
        return batch.Texts(self._progress, self._args.verbose and len(self._jobs) > 1)

    def _write(self, pair: Pair, output: OutputFile) -> batch.Totals:
        if output.done:
            self.note(f"{self._args.output} holds {output.done} of {len(self._jobs)} answers: going on after them")
        try:
            sink = batch.ToFile(output, self._jobs)
            return batch.run(pair, self._engine, self._jobs, sink, self._progress, output.done)
        except KeyboardInterrupt:
            self.note(f"{self._args.output} holds {output.done} of {len(self._jobs)} answers: the same command goes on "
                      "after them")
            raise

    def _stream(self, pair: Pair) -> Result:
        result = None
        requests = [api.new_request(pair, list(job.tokens), job.sampling) for job in self._jobs]
        show = self._progress.show
        for segment in api.stream_requests(pair, self._engine, requests,
                                           lambda done, total: show(f"prompt {done}/{total}", done, total)):
            self._progress.clear()
            print(segment.text, end="", flush=True)
            result = segment.result
        print(flush=True)
        assert result is not None
        return result


def _lines(args: argparse.Namespace, sampling: SamplingParams) -> list[Line]:
    if args.prompts_file is None:
        return [Line(text, sampling) for text in _prompts(args.prompt)]
    lines = prompts_file.load(args.prompts_file, sampling)
    for line in lines if args.ignore_chat_template else ():
        if not isinstance(line.prompt, str):
            raise RequestError(f"{line.where}: has messages, which only the chat template makes a prompt of: give it "
                               "a prompt instead, or leave out --ignore-chat-template")
    return lines


def _prompts(given: list[str] | None) -> list[str]:
    if given is None and sys.stdin.isatty():
        raise RequestError("no prompt given: pass --prompt, or --prompt - to read stdin")
    if given is not None and given.count("-") > 1:
        raise RequestError("--prompt - is given twice, but stdin can be read only once: give the others as text")
    texts = [prompts_file.read_stdin() if prompt == "-" else prompt for prompt in given or ["-"]]
    for text in texts:
        if not text.strip():
            raise RequestError("the prompt is empty: expected some text")
    return texts


def _tokens(pair: Pair, prompt: str | Sequence[Mapping[str, Any]], args: argparse.Namespace) -> list[int]:
    """A prompt's ids. --system-prompt comes before it, unless it is a conversation with a system message of its own."""
    if isinstance(prompt, str):
        if args.ignore_chat_template:
            return pair.tokenizer.encode(prompt if args.system_prompt is None else f"{args.system_prompt}\n{prompt}")
        prompt = [{"role": "user", "content": prompt}]
    if args.system_prompt is not None and not any(message["role"] in ("system", "developer") for message in prompt):
        prompt = [{"role": "system", "content": args.system_prompt}, *prompt]
    return pair.tokenizer.encode_chat(prompt)


def _flag(text: str) -> bool:
    if text.lower() not in ("t", "true", "f", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}; expected T or F")
    return text.lower() in ("t", "true")


class _CallableModule(types.ModuleType):
    """This module shares its name with the function `mlx_mtp.generate`; importing it must not hide that."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return api.generate(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
