"""Who runs next, as tables: what waits, what runs, what memory there is -> the plan."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.engine.request import Request
from mlx_mtp.engine.scheduler import CacheCosts, Scheduler
from mlx_mtp.errors import MemoryBudgetError, QueueFullError

PLENTY = 10**9
COSTS = CacheCosts(per_row=1000, per_token=10, step=10, slack=0)


def request(length: int, max_tokens: int = 10) -> Request:
    return Request([2] * length, SamplingParams(max_tokens), frozenset(), 100_000)


def scheduler(
    waiting: Sequence[Request], running: Sequence[Request] = (), memory: int = PLENTY, max_rows: int = 8,
    chunk: int = 100, reused: int = 0, planned_answer: int = 1000,
) -> Scheduler:
    config = EngineConfig(prefill_chunk=chunk, max_rows=max_rows, planned_answer=planned_answer)
    made = Scheduler(config, COSTS, memory, lambda prompt: reused)
    made.decoding += running
    for one in waiting:
        made.submit(one)
    return made


@pytest.mark.parametrize(("case", "waiting", "running", "max_rows", "reused", "admitted"), [
    ("nothing to do", [], 0, 8, 0, []),
    ("one prompt", [30], 0, 8, 0, [30]),
    ("short prompts share a chunk, in order", [30, 20, 25], 0, 8, 0, [30, 20, 25]),
    ("padding counts: 4 rows of 30 are 120 tokens", [30, 1, 1, 1], 0, 8, 0, [30, 1, 1]),
    ("a longer prompt would make the others' padding longer", [10, 10, 60], 0, 8, 0, [10, 10]),
    ("a prompt longer than a chunk goes alone", [101, 5], 0, 8, 0, [101]),
    ("and waits for those before it", [5, 101], 0, 8, 0, [5]),
    ("no more than there are rows", [5, 5, 5, 5], 6, 8, 0, [5, 5]),
    ("no row is free", [5], 8, 8, 0, []),
    ("what begins like something kept goes alone", [50, 50], 0, 8, 40, [50]),
])
def test_what_is_admitted(
    case: str, waiting: list[int], running: int, max_rows: int, reused: int, admitted: list[int]
) -> None:
    planner = scheduler([request(n) for n in waiting], [request(5) for _ in range(running)], PLENTY, max_rows,
                        reused=reused)
    plan = planner.plan()
    assert [len(one.prompt) for one in plan.prefill] == admitted, case
    assert plan.decodes == (running > 0)
    assert [len(one.prompt) for one in planner.waiting] == waiting[len(admitted) :]
    assert all(one.prefilled == reused for one in plan.prefill)


# Each row costs 1000, and 10 a token of the longest, answer of 10 included, in steps of 10 tokens.
@pytest.mark.parametrize(("case", "waiting", "running", "memory", "admitted"), [
    ("a row of 10 + 10 tokens takes 1200", [10], [], 1200, 1),
    ("two take twice that", [10, 10], [], 2400, 2),
    ("one byte less admits one", [10, 10], [], 2399, 1),
    ("a longer one makes all rows longer: 2 * (1000 + 10 * 60)", [10, 50], [], 3199, 1),
    ("just enough for that", [10, 50], [], 3200, 2),
    ("beside running rows the newcomer needs a copy: 2 * 1200 + 1200", [10], [10], 3600, 1),
    ("one byte less makes it wait", [10], [10], 3599, 0),
    ("the first does not fit, so the second waits too", [200, 1], [10], 5000, 0),
])
def test_memory_admits(case: str, waiting: list[int], running: list[int], memory: int, admitted: int) -> None:
    planner = scheduler([request(n) for n in waiting], [request(n) for n in running], memory)
    assert len(planner.plan().prefill) == admitted, case


def test_a_request_that_never_fits_is_refused_when_it_comes_and_a_full_queue_refuses_all() -> None:
    planner = scheduler([], memory=1199)
    with pytest.raises(MemoryBudgetError, match="10 tokens"):
        planner.submit(request(10))
    planner = Scheduler(EngineConfig(max_waiting=2), COSTS, PLENTY, lambda prompt: 0)
    planner.submit(request(1))
    planner.submit(request(1))
    with pytest.raises(QueueFullError, match="2 requests"):
        planner.submit(request(1))


def test_an_answer_longer_than_planned_counts_with_its_true_length() -> None:
    running = request(10, max_tokens=500)
    planner = scheduler([request(10)], [running], memory=2 * 1300 + 1200, planned_answer=20)
    assert len(planner.plan().prefill) == 1
    running.tokens += [5] * 100
    planner = scheduler([request(10)], [running], memory=2 * 1300 + 1200, planned_answer=20)
    assert planner.plan().prefill == ()


def test_a_long_prompt_keeps_its_turn_until_it_is_through() -> None:
    long, short = request(250), request(5)
    planner = scheduler([long, short], [request(5)])
    for _ in range(3):
        assert planner.plan().prefill == (long,)
        long.prefilled += 100
    planner.prefilled()
    assert planner.decoding[-1] is long
    assert planner.plan().prefill == (short,)


def test_first_come_is_first_served_however_many_small_ones_follow() -> None:
    """A large request at the head is not overtaken: it runs as soon as the rows before it have left."""
    large = request(300)
    planner = scheduler([large, *[request(1) for _ in range(50)]], [request(10)], memory=4200)
    assert planner.plan().prefill == ()
    planner.drop_row(0)
    assert planner.plan().prefill == (large,)


def test_rows_move_like_the_batchs() -> None:
    rows = [request(1) for _ in range(4)]
    planner = scheduler([], rows)
    assert planner.drop_row(1) is rows[1]
    assert planner.decoding == [rows[0], rows[3], rows[2]]
    assert planner.drop_row(2) is rows[2]
    assert planner.decoding == [rows[0], rows[3]]


def test_finished_requests_leave_the_queue_and_the_prefill() -> None:
    first, second, third = request(300), request(3), request(4)
    planner = scheduler([first, second, third])
    planner.plan()
    second.finish_reason = first.finish_reason = "aborted"
    assert planner.drop_waiting() == [second]
    assert planner.drop_prefilling() is first
    assert planner.drop_prefilling() is None
    assert planner.plan().prefill == (third,)
