"""The drafter against transformers' assistants, on the golden checkpoints."""

import mlx.core as mx
import pytest
from support import KINDS, golden, golden_pair, relative_error

from mlx_mtp.config import FULL, SLIDING, AttentionKind

TOLERANCE = 2e-5
POSITIONS = (1, 5, 15, 16, 17, 35, 80)
STEPS = 5
GOLDEN_NAMES: dict[AttentionKind, str] = {SLIDING: "sliding", FULL: "full"}
KeysValues = dict[AttentionKind, tuple[mx.array, mx.array]]


def donor_arrays(kind: str, position: int, room: int = 0) -> KeysValues:
    """The reference's donor K/V of positions 0 .. position - 1, followed by `room` slots of garbage."""
    arrays = golden(kind)
    result: KeysValues = {}
    for attention, name in GOLDEN_NAMES.items():
        pair = (arrays[f"drafter.{position}.{name}.{part}"][None] for part in ("keys", "values"))
        keys, values = (mx.pad(a, [(0, 0), (0, 0), (0, room), (0, 0)], constant_values=1e3) for a in pair)
        result[attention] = (keys, values)
    return result


def chain(kind: str, positions: list[int], keys_values: KeysValues) -> tuple[list[mx.array], list[mx.array], mx.array]:
    """Five chained steps for one row a position: logits [B, C] and ids of each step, tokens [B, 5]."""
    target, drafter = golden_pair(kind)
    arrays = golden(kind)
    slots = {attention: mx.arange(pair[0].shape[2])[None] for attention, pair in keys_values.items()}
    context = drafter.context(keys_values, slots, mx.array(positions))
    token = mx.stack([arrays[f"drafter.{p}.context"][-1] for p in positions])
    hidden = mx.stack([arrays[f"drafter.{p}.hidden"] for p in positions])
    logits, ids, tokens = [], [], []
    for _ in range(STEPS):
        candidates, hidden = drafter(target.embed(token), hidden, context)
        best = mx.argmax(candidates.logits, axis=-1)
        all_ids = mx.broadcast_to(mx.arange(candidates.logits.shape[1])[None], candidates.logits.shape)
        step_ids = all_ids if candidates.token_ids is None else candidates.token_ids
        token = mx.take_along_axis(step_ids, best[:, None], axis=1)[:, 0]
        logits.append(candidates.logits)
        ids.append(step_ids)
        tokens.append(token)
    return logits, ids, mx.stack(tokens, axis=1)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_five_chained_steps_equal_transformers_before_and_past_the_window(kind: str, position: int) -> None:
    logits, ids, tokens = chain(kind, [position], donor_arrays(kind, position))
    expected = golden(kind)[f"drafter.{position}.logits"]
    assert tokens[0].tolist() == golden(kind)[f"drafter.{position}.tokens"].tolist()
    for step in range(STEPS):
        assert relative_error(logits[step][0], expected[step][ids[step][0]]) <= TOLERANCE


def test_the_centroid_head_scores_its_clusters_only_and_misses_none_of_them() -> None:
    logits, ids, _ = chain("edge", [35], donor_arrays("edge", 35))
    possible = golden("edge")["drafter.35.logits"][0] > -float("inf")
    assert logits[0].shape == (1, 4 * 256 // 32)
    assert sorted(ids[0][0].tolist()) == [i for i, seen in enumerate(possible.tolist()) if seen]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_at_different_positions_run_in_one_forward_and_never_see_what_is_not_committed(kind: str) -> None:
    longest = max(POSITIONS)
    rows = [donor_arrays(kind, p, room=longest - p + 3) for p in POSITIONS]
    together: KeysValues = {
        attention: (
            mx.concatenate([row[attention][0] for row in rows]),
            mx.concatenate([row[attention][1] for row in rows]),
        )
        for attention in GOLDEN_NAMES
    }
    _, _, tokens = chain(kind, list(POSITIONS), together)
    for row, position in enumerate(POSITIONS):
        assert tokens[row].tolist() == golden(kind)[f"drafter.{position}.tokens"].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_query_position_can_be_shifted_as_other_stacks_do(kind: str) -> None:
    target, drafter = golden_pair(kind)
    arrays, keys_values = golden(kind), donor_arrays(kind, 35)
    slots = {attention: mx.arange(35)[None] for attention in keys_values}
    context = drafter.context(keys_values, slots, mx.array([35]), position_shift=-1)
    token, hidden = arrays["drafter.35.context"][-1:], arrays["drafter.35.hidden"][None]
    candidates, _ = drafter(target.embed(token), hidden, context)
    expected = arrays["drafter.35.logits_previous_position"]
    if candidates.token_ids is not None:
        expected = expected[candidates.token_ids[0]]
    assert relative_error(candidates.logits[0], expected) <= TOLERANCE
