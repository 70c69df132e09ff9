"""The engine: one read a round, stops that cut exactly, rows that leave, statistics that add up, no hidden costs."""

import time

import mlx.core as mx
import numpy as np
import pytest
from support import ReplayDrafter, decode, golden_pair, new_cache, random_prompts

from mlx_mtp import device
from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.engine import engine as engine_module
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import Request
from mlx_mtp.errors import RequestError
from mlx_mtp.spec_decode.loop import DecodeState, decode_round, first_token, prefill_chunk
from mlx_mtp.spec_decode.sampler import Sampler


def replayed(kind: str, max_tokens: int) -> tuple[list[int], ReplayDrafter, list[int]]:
    """A prompt, a drafter that is always right about its plain continuation, and that continuation."""
    target, _ = golden_pair(kind)
    prompt = random_prompts(9, 1, 30, 256)[0]
    text = decode(target, None, [prompt], [SamplingParams(max_tokens + 16)])[0].tokens
    known = np.array([[*prompt, *text]])
    return prompt, ReplayDrafter(known, np.ones_like(known, bool), 256), text


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_the_host_reads_once_a_round(rows: int, num_draft_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other way to wait for the device raises while rounds run; the first read is prefill's token."""
    target, drafter = golden_pair("edge")
    prompts = [prompt[:5] + [3] * (5 - len(prompt)) for prompt in random_prompts(0, rows, 5, 256)]
    requests = [Request(prompt, SamplingParams(40), frozenset(), 4096) for prompt in prompts]
    events = Engine(target, drafter, EngineConfig(num_draft_tokens=num_draft_tokens)).run(requests)
    next(events)

    reads = 0
    real_read = engine_module.read

    def counted_read(output: object) -> np.ndarray:
        nonlocal reads
        reads += 1
        return real_read(output)  # type: ignore[arg-type]

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the host waited for the device outside of `read`")

    monkeypatch.setattr(engine_module, "read", counted_read)
    monkeypatch.setattr(mx, "eval", forbidden)
    monkeypatch.setattr(mx, "synchronize", forbidden)
    for method in ("item", "tolist", "__bool__", "__int__", "__float__"):
        monkeypatch.setattr(mx.array, method, forbidden)
    while not all(len(request.tokens) > 20 for request in requests):
        next(events)
    rounds = max(request.rounds for request in requests)
    assert reads in (rounds, rounds + 1)  # the events of the last read may not all be taken yet


def test_the_next_round_is_handed_over_before_the_last_ones_tokens_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = golden_pair("edge")
    order: list[str] = []
    real_round, real_read = engine_module.decode_round, engine_module.read
    monkeypatch.setattr(engine_module, "decode_round", lambda *a: order.append("launch") or real_round(*a))
    monkeypatch.setattr(engine_module, "read", lambda output: order.append("read") or real_read(output))
    decode(target, drafter, [[2, 5, 9]], [SamplingParams(6)], num_draft_tokens=0)
    assert order == ["launch", "read"] * 5 + ["read"], "nothing is launched that max_tokens must throw away"


@pytest.mark.parametrize("num_draft_tokens", [0, 2, 5, 7])
def test_a_stop_token_inside_an_accepted_block_cuts_exactly_there(num_draft_tokens: int) -> None:
    target, _ = golden_pair("dense")
    prompt, replay, text = replayed("dense", 30)
    for stop in dict.fromkeys(text[2:20]):
        request = decode(target, replay, [prompt], [SamplingParams(30)], num_draft_tokens, frozenset([stop]))[0]
        assert request.tokens == text[: text.index(stop)]
        assert request.finish_reason == "stop"


@pytest.mark.parametrize("num_draft_tokens", [0, 3, 7])
def test_max_tokens_is_kept_to_the_token(num_draft_tokens: int) -> None:
    target, _ = golden_pair("dense")
    prompt, replay, text = replayed("dense", 20)
    for max_tokens in (1, 2, 5, 9, 16):
        request = decode(target, replay, [prompt], [SamplingParams(max_tokens)], num_draft_tokens)[0]
        assert request.tokens == text[:max_tokens]
        assert request.finish_reason == "length"


def test_the_context_ends_the_answer_and_too_long_a_prompt_is_refused() -> None:
    target, drafter = golden_pair("edge")
    request = Request([2, 7, 9], SamplingParams(50), frozenset(), max_context=13)
    for _ in Engine(target, drafter, EngineConfig(num_draft_tokens=3)).run([request]):
        pass
    assert len(request.tokens) == 10
    assert request.finish_reason == "length"
    for prompt in ([], [2] * 13):
        with pytest.raises(RequestError):
            Request(prompt, SamplingParams(), frozenset(), max_context=13)


def test_rows_that_end_leave_the_others_alone_and_a_caller_can_end_one() -> None:
    target, drafter = golden_pair("mixture")
    prompts = random_prompts(8, 5, 40, 256)
    lengths = [3, 30, 11, 50, 22]
    alone = [decode(target, None, [prompt], [SamplingParams(n)])[0].tokens
             for prompt, n in zip(prompts, lengths, strict=True)]
    requests = [Request(prompt, SamplingParams(n), frozenset(), 4096)
                for prompt, n in zip(prompts, lengths, strict=True)]
    for event in Engine(target, drafter, EngineConfig(num_draft_tokens=2)).run(requests):
        if event.request is requests[3] and len(requests[3].tokens) >= 7:
            requests[3].finish_reason = "aborted"
    for i in (0, 1, 2, 4):
        assert requests[i].tokens == alone[i]
    assert 7 <= len(requests[3].tokens) <= 9
    assert requests[3].tokens == alone[3][: len(requests[3].tokens)]


def test_statistics_add_up() -> None:
    target, _ = golden_pair("dense")
    prompt, replay, _ = replayed("dense", 25)
    stats = decode(target, replay, [prompt], [SamplingParams(25)], num_draft_tokens=3)[0].stats(peak_memory=1.5)
    assert (stats.prompt_tokens, stats.generation_tokens, stats.rounds) == (len(prompt), 25, 6)
    assert (stats.drafted, stats.accepted, stats.accepted_at) == (18, 18, (6, 6, 6))
    assert stats.mean_acceptance_length == 4.0
    assert stats.generation_tokens == 1 + stats.rounds + stats.accepted
    assert stats.peak_memory == 1.5
    assert stats.ttft > 0
    assert stats.generation_tps > 0
    plain = decode(target, None, [prompt], [SamplingParams(5)])[0].stats(peak_memory=0.0)
    assert (plain.rounds, plain.drafted, plain.accepted_at, plain.mean_acceptance_length) == (4, 0, (), 1.0)


def test_only_what_became_text_is_counted_as_accepted() -> None:
    """A block may go beyond max_tokens or a stop: what was thrown away saved nothing."""
    target, _ = golden_pair("dense")
    prompt, replay, text = replayed("dense", 30)
    for max_tokens in (2, 5, 9, 12):
        stats = decode(target, replay, [prompt], [SamplingParams(max_tokens)], 7)[0].stats(peak_memory=0.0)
        assert stats.generation_tokens <= 1 + stats.rounds + stats.accepted <= stats.generation_tokens + 1
    stop = next(token for token in text[3:] if text.index(token) >= 3)
    request = decode(target, replay, [prompt], [SamplingParams(30)], 7, frozenset([stop]))[0]
    stats = request.stats(peak_memory=0.0)
    assert stats.generation_tokens <= 1 + stats.rounds + stats.accepted <= stats.generation_tokens + 1
    cut = Request([2], SamplingParams(50), frozenset(), 100)
    cut.receive([5])
    cut.receive([7, 8, 9, 6], drafted=3)
    assert (cut.stop_after(3), cut.tokens, cut.accepted_counts) == (2, [5, 7, 8], [2])
    assert cut.tokens_by_rows == {1: 2}, "nor would plain decoding have run them"
    cut.stop_after(0)
    assert (cut.accepted_counts, cut.tokens_by_rows) == ([0], {1: 0})


def test_a_request_that_was_given_up_before_its_first_token_says_so() -> None:
    assert Request([2], SamplingParams(50), frozenset(), 100).stats(peak_memory=0.0).ttft == 0.0


def test_acceptance_at_a_position_counts_the_rounds_that_got_so_far() -> None:
    request = Request([2], SamplingParams(50), frozenset(), 100)
    request.receive([5])
    for accepted in (3, 0, 1, 3, 2):
        request.receive([7] * (accepted + 1), drafted=3)
    stats = request.stats(peak_memory=0.0)
    assert (stats.rounds, stats.drafted, stats.accepted) == (5, 15, 9)
    assert stats.accepted_at == (4, 3, 2)
    assert stats.mean_acceptance_length == 1 + 9 / 5


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 4, 7])
def test_long_texts_cross_every_step_of_reading_and_growing(num_draft_tokens: int) -> None:
    """Full acceptance makes the bounds tight: a row as long as it can be, past 64 read and 256 grown, several times."""
    target, _ = golden_pair("unified")
    prompts = [[2, 7, 9], [2, 100, 50, 31]]
    sampling = [SamplingParams(330, temperature=1.0, seed=row) for row in range(2)]
    texts = [[*prompt, *decode(target, None, [prompt], [one])[0].tokens]
             for prompt, one in zip(prompts, sampling, strict=True)]
    length = max(map(len, texts))
    known = np.array([text + [0] * (length - len(text)) for text in texts])
    replay = ReplayDrafter(known, np.ones_like(known, bool), 256)
    requests = decode(target, replay, prompts, sampling, num_draft_tokens)
    assert [request.tokens for request in requests] == [text[len(p) :] for p, text in zip(prompts, texts, strict=True)]
    assert requests[0].stats(0.0).mean_acceptance_length > 0.95 * (num_draft_tokens + 1)


def test_every_launched_round_is_handed_to_the_device_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = golden_pair("edge")
    handed: list[tuple[int, ...]] = []
    real = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: handed.append(arrays[0].shape) or real(*arrays))
    decode(target, drafter, [[2, 5, 9]], [SamplingParams(6)], num_draft_tokens=2)
    rounds = handed[handed.index((1, 2)) + 1 :]  # what comes after the prefill's token
    assert len(rounds) > 1
    assert set(rounds) == {(1, 4)}


def rounds_at(capacity: int) -> tuple[DecodeState, object, object]:
    target, drafter = golden_pair("edge")
    cache = new_cache(target, rows=2, reserve=capacity)
    state = DecodeState(mx.zeros((2,), mx.int32), mx.zeros((2, 64)), cache, Sampler.of([SamplingParams()] * 2))
    state, _ = prefill_chunk(target, state, mx.full((2, 100), 7), mx.array([100, 60]))
    mx.eval(state.hidden, cache.arrays)
    return first_token(target, state), target, drafter


def timed_rounds(capacity: int, count: int) -> tuple[float, int]:
    """Best seconds of a round in the pipeline, and the peak memory above what was there before."""
    state, target, drafter = rounds_at(capacity)
    mx.eval(state.last_token)
    before, best = mx.get_active_memory(), float("inf")
    mx.reset_peak_memory()
    flying = None
    for _ in range(count):
        start = time.perf_counter()
        state, output = decode_round(target, drafter, state, 3)  # type: ignore[arg-type]
        mx.async_eval(output.packed, state.last_token, state.hidden, state.cache.lengths)
        if flying is not None:
            engine_module.read(flying)
        flying = output
        best = min(best, time.perf_counter() - start)
    assert flying is not None
    engine_module.read(flying)
    return best, mx.get_peak_memory() - before


def test_a_rounds_time_and_memory_do_not_grow_with_the_capacity() -> None:
    """32k against 2k tokens of room, same length: at most 1.1 times.

    Interleaved, and each side's best: a busy machine makes some runs slower, never faster, so more runs tell more.
    """
    timed_rounds(2048, 5)
    small: list[tuple[float, int]] = []
    large: list[tuple[float, int]] = []
    for _ in range(60):  # a machine whose pace changes may need many
        small.append(timed_rounds(2048, 12))
        large.append(timed_rounds(32_768, 12))
        (seconds_2k, memory_2k), (seconds_32k, memory_32k) = (
            [min(column) for column in zip(*runs, strict=True)] for runs in (small, large))
        if seconds_32k <= 1.1 * seconds_2k and memory_32k <= 1.1 * memory_2k:
            return
    raise AssertionError(f"32k: {seconds_32k:.4f} s, {memory_32k} bytes; 2k: {seconds_2k:.4f} s, {memory_2k} bytes")


@pytest.mark.parametrize("most", [0, 1, 7])
def test_auto_gives_plain_decodings_text_and_keeps_to_the_longest_draft(most: int) -> None:
    target, drafter = golden_pair("dense")
    prompts = [[2, 5, 9], [2, 7], [2, 11, 12, 13]]
    alone = [decode(target, None, [prompt], [SamplingParams(60)])[0].tokens for prompt in prompts]
    requests = [Request(prompt, SamplingParams(60), frozenset(), 1000) for prompt in prompts]
    engine = Engine(target, drafter, EngineConfig(max_draft_tokens=most))
    for _ in engine.run(requests):
        pass
    assert [request.tokens for request in requests] == alone
    used = requests[0].rounds_by_length
    assert max(used) <= most
    assert most == 0 or (0 in used and len(used) > 1)


def test_a_request_is_submitted_once() -> None:
    target, drafter = golden_pair("edge")
    engine = Engine(target, drafter, EngineConfig())
    request = Request([2, 3, 4], SamplingParams(5), frozenset(), 4096)
    engine.submit(request)
    for _ in range(2):
        with pytest.raises(RequestError, match="was submitted before"):
            engine.submit(request)
        while not engine.is_idle:
            engine.step()
    assert len(request.tokens) == 5


def test_far_into_a_long_prompt_chunks_are_as_small_as_their_scores_need(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = golden_pair("edge")
    prompt = random_prompts(3, 1, 1500, 256)[0]
    config = EngineConfig(prefill_chunk=256, prefix_tokens=0)
    text = decode(target, drafter, [prompt], [SamplingParams(6)], prefill_chunk=256)[0].tokens

    chunks, released = [], []
    real = engine_module.prefill_chunk
    monkeypatch.setattr(engine_module, "prefill_chunk",
                        lambda target, state, tokens, valid: chunks.append(tokens.shape[1]) or real(
                            target, state, tokens, valid))
    monkeypatch.setattr(device, "release_unused", lambda: released.append(len(chunks)))
    heads = target.config.text.num_heads
    most = 256 * 512 * heads * 4
    monkeypatch.setattr(device, "memory_bytes", lambda: 10**9)
    monkeypatch.setattr(engine_module, "SCORES_SHARE", most / 10**9 / device.WORKING_SPACE)
    request = Request(prompt, SamplingParams(6), frozenset(), 4096)
    list(Engine(target, drafter, config).run([request]))
    done = 0
    for size in chunks[:-1]:
        assert size * (done + size) * heads * 4 <= most
        done += size
    assert chunks[:3] == [256, 256, 128]
    assert sum(chunks) == len(prompt)
    assert released == list(range(1, len(chunks)))  # between chunks, since the next one's scores are larger
    assert request.tokens == text


def test_unused_buffers_are_given_back_now_and_then_while_rounds_run(monkeypatch: pytest.MonkeyPatch) -> None:
    target, drafter = golden_pair("edge")
    released = []
    monkeypatch.setattr(device, "release_unused", lambda: released.append(1))
    monkeypatch.setattr(engine_module, "RELEASE_EVERY", 3)
    request = Request([2, 3, 4], SamplingParams(12), frozenset(), 4096)
    list(Engine(target, drafter, EngineConfig(num_draft_tokens=0)).run([request]))
    assert request.rounds == 11
    assert len(released) == 11 // 3
