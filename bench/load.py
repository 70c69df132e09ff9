"""A load test: clients whose requests come at random times, each from a thread of its own, into one engine.

    python -m bench.load --quick                                     the built-in pair
    python -m bench.load --model FOLDER --clients 16 --rate 4 --requests 8

Arrivals are a Poisson process of `--rate` requests a second over all clients, the same for the same seed. Clients do
not wait for answers, so more load than the engine carries lengthens the queue, and the times to the first token.
The JSON file is one `LoadRecord`.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import blas
from bench.card import checkpoint_card, environment_card, print_card
from bench.decode import folders, guarded
from bench.prompts import ALL_KINDS, KINDS, prompts
from bench.runners import DraftLength
from mlx_mtp import Pair
from mlx_mtp.check import loading
from mlx_mtp.check.command import check_output_folder, write_whole
from mlx_mtp.command import Parser, num_draft_tokens
from mlx_mtp.config import AUTO, EngineConfig, SamplingParams
from mlx_mtp.device import wired_memory
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import Request
from mlx_mtp.errors import QueueFullError, RequestError

IDLE = 0.001  # seconds between two looks at an empty queue
SCHEMA = "mlx_mtp bench.load 1"


@dataclass(frozen=True)
class LoadConfig:
    """clients: threads. requests: of each client. rate: requests a second of all clients together. max_tokens: of an
    answer. prompts: kinds to choose from at random. seed: of arrivals and choices. The others are EngineConfig's."""

    clients: int = 8
    requests: int = 8
    rate: float = 4.0
    max_tokens: int = 64
    prompts: tuple[str, ...] = tuple(KINDS)
    seed: int = 0
    num_draft_tokens: DraftLength = AUTO
    max_rows: int = EngineConfig().max_rows
    max_waiting: int = EngineConfig().max_waiting

    def __post_init__(self) -> None:
        self.engine_config()  # complains of a setting
        if min(self.clients, self.requests, self.max_tokens) < 1 or not self.rate > 0:
            raise RequestError("clients, requests and max_tokens must be at least 1, and rate above 0")
        for kind in self.prompts:
            if kind not in ALL_KINDS:
                raise RequestError(f"there are no prompts of the kind {kind!r}; expected one of {', '.join(ALL_KINDS)}")

    def engine_config(self) -> EngineConfig:
        return EngineConfig(num_draft_tokens=self.num_draft_tokens, max_rows=self.max_rows,
                            max_waiting=self.max_waiting)


QUICK = LoadConfig(clients=4, requests=4, rate=8.0, max_tokens=32)


@dataclass(frozen=True)
class Percentiles:
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """By linear interpolation; None if there is no value."""
        return cls(*(float(value) for value in np.percentile(values, (50, 90, 99)))) if values else None


@dataclass(frozen=True)
class LoadRecord:
    """finished, refused: requests, the latter by a full queue. seconds: from the first arrival to the last token.
    tokens_per_s: of answers, over those seconds. mean_rows: rows in use, averaged over the time of all steps.
    ttft_ms: from submission to the first token, waiting included. tpot_ms: an output token after the first."""

    card: dict[str, str]
    settings: dict[str, Any]
    finished: int
    refused: int
    tokens: int
    seconds: float
    tokens_per_s: float
    requests_per_s: float
    mean_rows: float
    mean_acceptance_length: float | None
    ttft_ms: Percentiles | None
    tpot_ms: Percentiles | None
    schema: str = SCHEMA


def arrivals(config: LoadConfig) -> list[list[float]]:
    """For each client the seconds from the start at which it submits: gaps are exponential, of mean clients / rate."""
    generator = np.random.default_rng(config.seed)
    gaps = generator.exponential(config.clients / config.rate, (config.clients, config.requests))
    return [list(map(float, times)) for times in gaps.cumsum(axis=1)]


class Client(threading.Thread):
    """Submits its requests when their time has come, and counts those that are refused."""

    def __init__(self, engine: Engine, requests: Sequence[tuple[float, Request]], start: float) -> None:
        super().__init__(daemon=True)
        self._engine, self._requests, self._start_at = engine, requests, start
        self.accepted: list[Request] = []
        self.refused = 0

    def run(self) -> None:
        for at, request in self._requests:
            time.sleep(max(0.0, self._start_at + at - time.perf_counter()))
            try:
                self._engine.submit(request)
            except QueueFullError:
                self.refused += 1
            else:
                self.accepted.append(request)


def run_load(pair: Pair, config: LoadConfig, card: dict[str, str]) -> LoadRecord:
    """Steps the engine on this thread until every client is through and every answer whole."""
    engine = Engine(pair.target, pair.drafter, config.engine_config(), pair.round_costs)
    warm_up(pair, engine, config)
    requests = _requests(pair, config)
    for _, request in (one for of_client in requests for one in of_client):
        engine.check(request)
    begun = time.perf_counter()
    clients = [Client(engine, of_client, begun) for of_client in requests]
    for client in clients:
        client.start()
    busy = row_seconds = 0.0
    with wired_memory():
        while any(client.is_alive() for client in clients) or not engine.is_idle:
            if engine.is_idle:
                time.sleep(IDLE)
                continue
            start = time.perf_counter()
            engine.step()
            took = time.perf_counter() - start
            busy, row_seconds = busy + took, row_seconds + took * engine.active_rows
    finished = [request for client in clients for request in client.accepted]
    refused = sum(client.refused for client in clients)
    return _record(config, card, finished, refused, row_seconds / busy)


def warm_up(pair: Pair, engine: Engine, config: LoadConfig) -> None:
    """A full batch, so that the first client does not pay for what is made once."""
    batch = prompts(pair, config.prompts[0], config.max_rows, 0)
    sampling = SamplingParams(min(8, config.max_tokens))
    for _ in engine.run([Request(prompt, sampling, frozenset(), pair.max_context) for prompt in batch]):
        pass


def _requests(pair: Pair, config: LoadConfig) -> list[list[tuple[float, Request]]]:
    """For each client (time, request) pairs. Prompts come from the kinds' eight, drawn with the seed."""
    generator = np.random.default_rng(config.seed + 1)
    known = [prompt for kind in config.prompts for prompt in prompts(pair, kind, 8, 0)]
    stop, sampling = pair.tokenizer.stop_tokens, SamplingParams(config.max_tokens)
    return [[(at, Request(known[generator.integers(len(known))], sampling, stop, pair.max_context)) for at in times]
            for times in arrivals(config)]


def _record(
    config: LoadConfig, card: dict[str, str], finished: Sequence[Request], refused: int, mean_rows: float
) -> LoadRecord:
    tokens = sum(len(request.tokens) for request in finished)
    seconds = max(request.last_token_at for request in finished) - min(request.submitted for request in finished)
    stats = [request.stats(0.0) for request in finished]
    rounds = sum(one.rounds for one in stats)
    return LoadRecord(
        card=card, settings=asdict(config), finished=len(finished), refused=refused, tokens=tokens, seconds=seconds,
        tokens_per_s=tokens / seconds, requests_per_s=len(finished) / seconds, mean_rows=mean_rows,
        mean_acceptance_length=1 + sum(one.accepted for one in stats) / rounds if rounds else None,
        ttft_ms=Percentiles.of([1e3 * one.ttft for one in stats]),
        tpot_ms=Percentiles.of([1e3 / one.generation_tps for one in stats if one.generation_tps > 0]))


def report(record: LoadRecord) -> None:
    settings = record.settings
    print(f"\n{settings['clients']} clients, {settings['rate']:g} requests/s in all, Poisson, seed {settings['seed']}; "
          f"greedy, up to {settings['max_tokens']} tokens, K = {settings['num_draft_tokens']}, "
          f"up to {settings['max_rows']} rows")
    print(f"{record.finished} finished, {record.refused} refused; {record.tokens_per_s:.1f} tok/s and "
          f"{record.requests_per_s:.2f} requests/s over {record.seconds:.1f} s; {record.mean_rows:.2f} rows in use")
    for name, found in (("TTFT", record.ttft_ms), ("TPOT", record.tpot_ms)):
        if found is not None:
            print(f"{name}  p50 {found.p50:8.2f} ms   p90 {found.p90:8.2f} ms   p99 {found.p99:8.2f} ms")


def parser() -> argparse.ArgumentParser:
    default = LoadConfig()
    cli = Parser(prog="python -m bench.load", description=(__doc__ or "").splitlines()[0])
    add = cli.add_argument
    add("--model", help="checkpoint folder or Hub name (default: the built-in pair)")
    add("--draft-model", default=AUTO, help="default: %(default)s")
    for name in ("clients", "requests", "max_tokens", "seed", "max_rows", "max_waiting"):
        add(f"--{name.replace('_', '-')}", type=int, help=f"default: {getattr(default, name)}")
    add("--rate", type=float, help=f"requests a second, of all clients together (default: {default.rate:g})")
    add("--num-draft-tokens", type=num_draft_tokens,
        help=f"K, or auto (default: {default.num_draft_tokens})")
    add("--prompts", nargs="+", metavar="KIND", help=f"of {', '.join(ALL_KINDS)} (default: {' '.join(KINDS)})")
    add("--no-calibration", action="store_true",
        help="run a mixture's experts the default way, not the one that is the fastest here")
    add("--output", type=Path, default=Path("bench-results"), help="folder for load.json (default: %(default)s)")
    add("--quick", action="store_true", help="a short test; other flags change it")
    blas.add_flag(cli)
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    return guarded(lambda: _main(args))


def _main(args: argparse.Namespace) -> None:
    given = {field.name: value for field in fields(LoadConfig) if (value := getattr(args, field.name)) is not None}
    config = replace(QUICK if args.quick else LoadConfig(), **{
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    check_output_folder(args.output)
    pair = loading.load(args.model, args.draft_model, calibrate=not args.no_calibration)
    card = environment_card() | checkpoint_card(pair, *folders(args.model, args.draft_model))
    print_card(card)
    record = run_load(pair, config, card)
    report(record)
    path = args.output / "load.json"
    write_whole(path, json.dumps(asdict(record), indent=1, allow_nan=False) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    blas.prefer_openblas()
    sys.exit(main())
