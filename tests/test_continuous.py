"""Requests that come and go: each gets the text it would get alone, and nothing of what it leaves behind is wrong."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
from lossless import EXCUSABLE_GAP, margin
from mlx.utils import tree_flatten
from support import ReplayDrafter, decode, golden_pair, random_prompts

from mlx_mtp import device
from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.engine import engine as engine_module
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import Request
from mlx_mtp.errors import MemoryBudgetError, QueueFullError, RequestError

VOCABULARY = 256


def any_settings(generator: random.Random, longest: int = 40) -> SamplingParams:
    return SamplingParams(
        max_tokens=generator.randint(1, longest), temperature=generator.choice([0.0, 0.0, 0.7, 1.0]),
        top_k=generator.choice([0, 20]), top_p=generator.choice([1.0, 0.9]), seed=generator.randrange(1000),
    )


def drain(engine: Engine, most_steps: int = 2000) -> None:
    for _ in range(most_steps):
        if engine.is_idle:
            return
        engine.step()
    raise AssertionError("the engine does not come to an end")


def assert_as_alone(kind: str, requests: list[Request]) -> None:
    """Every finished request has the text of plain decoding alone; an aborted one a beginning of it."""
    target, _ = golden_pair(kind)
    for request in requests:
        text = decode(target, None, [request.prompt], [request.sampling], 0, request.stop_tokens)[0]
        expected = text.tokens[: len(request.tokens)] if request.finish_reason == "aborted" else text.tokens
        if request.tokens != expected:
            assert margin(target, request, text.tokens) <= EXCUSABLE_GAP
        elif request.finish_reason != "aborted":
            assert request.finish_reason == text.finish_reason


class Listening:
    """Drafts 3, 0, 3, 0, ... tokens, and notes what it hears of each round."""

    longest = 3

    def __init__(self) -> None:
        self.chosen: list[int] = []
        self.heard: list[int] = []
        self.timed: list[tuple[int, int, float | None]] = []

    def choose(self, rows: int) -> int:
        self.chosen.append(0 if len(self.chosen) % 2 else 3)
        return self.chosen[-1]

    def observe(self, rows: int, num_draft_tokens: int, accepted: list[int]) -> None:
        assert len(accepted) == rows
        self.heard.append(num_draft_tokens)

    def observe_seconds(self, rows: int, num_draft_tokens: int, seconds: float | None) -> None:
        self.timed.append((rows, num_draft_tokens, seconds))

    def new_task(self) -> None:
        pass

    def plain_seconds(self, tokens_by_rows: dict[int, int]) -> None:
        return None


@pytest.mark.parametrize(("least_wait", "later"), [(-1.0, 0), (2.0, 1)], ids=["the device is slower", "the host is"])
def test_time_is_that_of_the_round_that_took_it(
    monkeypatch: pytest.MonkeyPatch, least_wait: float, later: int
) -> None:
    monkeypatch.setattr("mlx_mtp.engine.engine.LEAST_WAIT", least_wait)
    target, drafter = golden_pair("edge")
    engine = Engine(target, drafter, EngineConfig(num_draft_tokens=3))
    engine._draft_length = heard = Listening()
    for prompt in random_prompts(6, 2, 12, VOCABULARY):
        engine.submit(Request(prompt, SamplingParams(20), frozenset(), 100))
    drain(engine)
    assert heard.heard == heard.chosen[: len(heard.heard)]
    lengths = [num_drafted for _, num_drafted, _ in heard.timed]
    assert len(lengths) >= 10
    assert lengths == heard.chosen[later : later + len(lengths)]
    assert len(lengths) < len(heard.heard)  # behind the last round nothing was in flight
    both = [seconds for rows, _, seconds in heard.timed if rows == 2][1:-1]
    assert both
    assert all(seconds is not None and seconds > 0 for seconds in both)


@pytest.mark.parametrize("kind", ["edge", "mixture", "unified"])
def test_requests_that_arrive_and_leave_at_random_get_the_text_they_get_alone(kind: str) -> None:
    """Lengths of 1 to 6 windows, shared beginnings, small chunks, aborts in every state, answers gone on from."""
    target, drafter = golden_pair(kind)
    generator = random.Random(4)
    window = target.config.text.window
    config = EngineConfig(num_draft_tokens=3, prefill_chunk=24, max_rows=5)
    engine = Engine(target, drafter, config)
    system = random_prompts(50, 1, 1, VOCABULARY)[0] + [generator.randrange(3, VOCABULARY) for _ in range(3 * window)]
    upcoming = []
    for prompt in random_prompts(5, 24, 6 * window, VOCABULARY):
        begins = system[: generator.randint(1, len(system))] if generator.random() < 0.5 else []
        upcoming.append(Request(begins + prompt, any_settings(generator), frozenset([7]), 4096,
                                keep_answer=generator.random() < 0.5))
    requests, states = [], set()
    while upcoming or not engine.is_idle:
        while upcoming and generator.random() < 0.4:
            requests.append(upcoming.pop())
            engine.submit(requests[-1])
        for event in engine.step():
            request = event.request
            if request.finish_reason == "length" and request.keep_answer and len(requests) < 30:
                follow_up = [*request.prompt, *request.tokens, *random_prompts(len(requests), 1, 9, VOCABULARY)[0]]
                upcoming.append(Request(follow_up, any_settings(generator), frozenset([7]), 4096))
        states |= {request.state for request in requests}
        if generator.random() < 0.08 and requests:
            engine.abort(generator.choice(requests).id)
    assert states == {"waiting", "prefilling", "decoding", "finished"}
    assert any(request.reused > 0 for request in requests)
    assert_as_alone(kind, requests)


@pytest.mark.parametrize("dropped", [0, 20])
@pytest.mark.parametrize("num_draft_tokens", [0, 3, 7])
def test_an_answer_that_was_kept_is_gone_on_from_with_the_same_text(num_draft_tokens: int, dropped: int) -> None:
    """The next turn of a chat runs its new tokens only, although a round was in flight when the answer ended.

    All drafts are right, so that the ring has been written on as far as it can be. An answer that its caller cuts
    (a stop string) further back than the ring reaches is not gone on from at its end, but still at its prompt's.
    """
    target, _ = golden_pair("dense")
    prompt = [2, *random_prompts(3, 1, 40, VOCABULARY)[0]] * 2
    text = decode(target, None, [prompt], [SamplingParams(120)])[0].tokens
    known = np.array([[*prompt, *text]])
    replay = ReplayDrafter(known, np.ones_like(known, bool), VOCABULARY)
    for end in range(60, 60 + num_draft_tokens + 1, 2):  # at every place of a block
        engine = Engine(target, replay, EngineConfig(num_draft_tokens=num_draft_tokens))
        first = Request(prompt, SamplingParams(100), frozenset(), 4096, keep_answer=True)
        engine.submit(first)
        while len(first.tokens) < end:
            engine.step()
        first.stop_after(end - dropped)
        drain(engine)
        second = Request([*first.prompt, *first.tokens, 9, 8, 7], SamplingParams(12), frozenset(), 4096)
        engine.submit(second)
        drain(engine)
        assert second.reused == len(prompt) + (0 if dropped else len(first.tokens) - 1)
        assert_as_alone("dense", [second])


def test_a_shared_beginning_is_run_once() -> None:
    target, drafter = golden_pair("edge")
    engine = Engine(target, drafter, EngineConfig(prefill_chunk=64))
    system = random_prompts(1, 1, 1, VOCABULARY)[0] * 150
    requests = [Request([*system, *tail], SamplingParams(20), frozenset(), 4096) for tail in
                ([5] * 30, [6] * 50, [5] * 10 + [4] * 10)]
    for request in requests:
        engine.submit(request)
        drain(engine)
    assert [request.reused for request in requests] == [0, 150, 160]
    assert_as_alone("edge", requests)


@pytest.mark.parametrize("state", ["waiting", "prefilling", "decoding"])
def test_abort_frees_a_request_in_any_state_within_a_round(state: str) -> None:
    target, drafter = golden_pair("dense")
    engine = Engine(target, drafter, EngineConfig(prefill_chunk=8, max_rows=1))
    if state == "waiting":
        engine.submit(Request([2, 3], SamplingParams(1000), frozenset(), 4096))
        engine.step()
    request = Request([2] * (30 if state == "prefilling" else 5), SamplingParams(1000), frozenset(), 4096)
    engine.submit(request)
    engine.step()
    if state == "decoding":
        engine.step()
    assert request.state == state
    assert engine.abort(request.id)
    events = engine.step()
    assert [event.request for event in events if event.request.is_finished] == [request]
    assert request.finish_reason == "aborted"
    engine.step()
    assert not engine.abort(request.id)
    assert engine.active_rows == (1 if state == "waiting" else 0)


def test_aborting_what_has_finished_or_never_was_does_nothing() -> None:
    target, drafter = golden_pair("dense")
    engine = Engine(target, drafter, EngineConfig())
    request = Request([2, 3], SamplingParams(3), frozenset(), 4096)
    assert not engine.abort(0), "of the id that the next request gets"
    engine.submit(request)
    while not request.is_finished:
        engine.step()
    engine.abort(request.id)
    assert not engine.abort(77)
    assert engine.step() == []
    assert (request.finish_reason, engine.is_idle) == ("length", True)


def test_a_long_prompt_holds_running_rows_up_by_one_chunk_a_round() -> None:
    target, drafter = golden_pair("dense")
    engine = Engine(target, drafter, EngineConfig(prefill_chunk=16, num_draft_tokens=0))
    running = Request([2, 3, 4], SamplingParams(200), frozenset(), 4096)
    engine.submit(running)
    for _ in range(3):
        engine.step()
    long = Request([2] * 160, SamplingParams(5), frozenset(), 4096)
    engine.submit(long)
    before = len(running.tokens)
    steps = 0
    while not long.tokens:
        engine.step()
        steps += 1
    assert steps == 10
    assert len(running.tokens) == before + 10


def test_requests_are_taken_from_any_thread_and_a_full_queue_says_so() -> None:
    target, drafter = golden_pair("dense")
    engine = Engine(target, drafter, EngineConfig(max_waiting=20))
    requests = [Request([2, 3 + i], SamplingParams(5), frozenset(), 4096) for i in range(40)]
    accepted: list[Request] = []
    refused: list[Request] = []

    def submit(mine: list[Request]) -> None:
        for request in mine:
            try:
                engine.submit(request)
                accepted.append(request)
            except QueueFullError:
                refused.append(request)

    threads = [threading.Thread(target=submit, args=(requests[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(accepted), len(refused)) == (20, 20)
    assert len({request.id for request in accepted}) == 20
    drain(engine)
    assert all(len(request.tokens) == 5 for request in accepted)


def test_a_job_waits_where_others_have_just_filled_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = golden_pair("dense")
    engine = Engine(target, drafter, EngineConfig(max_rows=1, max_waiting=1))
    foreign, *mine = [Request([2, 3 + i], SamplingParams(5), frozenset(), 4096) for i in range(4)]
    engine.submit(foreign)
    submit, refusals = engine.submit, [QueueFullError("another thread was faster")]

    def raced(request: Request) -> int:
        if refusals:
            raise refusals.pop()
        return submit(request)

    monkeypatch.setattr(engine, "submit", raced)
    for _ in engine.run(mine):
        pass
    assert [len(request.tokens) for request in (foreign, *mine)] == [5] * 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_engine_whose_step_was_broken_off_gives_no_more_tokens(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device has committed a round that the host has not read: going on would leave it out of the text."""
    target, drafter = golden_pair("dense")
    engine = Engine(target, drafter, EngineConfig())
    request = Request([2, 3], SamplingParams(50), frozenset(), 4096)
    engine.submit(request)
    while len(request.tokens) < 5:
        engine.step()

    def broken(output: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(engine_module, "read", broken)
        with pytest.raises(error):
            engine.step()
    for _ in range(2):
        with pytest.raises(RequestError, match=r"was broken off: make a new one \(mlx_mtp\.new_engine\)"):
            engine.step()


def test_a_caller_who_has_enough_leaves_nothing_behind() -> None:
    target, drafter = golden_pair("dense")
    engine = Engine(target, drafter, EngineConfig(max_rows=2, max_waiting=3))
    requests = [Request([2, 3 + i], SamplingParams(50), frozenset(), 4096) for i in range(6)]
    for event in engine.run(requests):
        if len(event.request.tokens) > 5:
            break
    assert not engine.is_idle
    engine.step()
    assert engine.is_idle


def test_what_the_device_could_never_hold_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = golden_pair("dense")
    weights = sum(array.nbytes for model in (target, drafter) for _, array in tree_flatten(model.parameters()))
    monkeypatch.setattr(device, "memory_bytes", lambda: int((weights + 3_000_000) / 0.95))
    engine = Engine(target, drafter, EngineConfig())
    engine.submit(Request([2] * 100, SamplingParams(100), frozenset(), 100_000))
    with pytest.raises(MemoryBudgetError, match="max_tokens"):
        engine.submit(Request([2] * 30_000, SamplingParams(100), frozenset(), 100_000))
