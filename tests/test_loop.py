"""The loop's invariants: what a round accepts, commits and leaves behind."""

import mlx.core as mx
import numpy as np
import pytest
from support import KINDS, ReplayDrafter, decode, golden, golden_pair, new_cache, random_prompts

from mlx_mtp.config import SamplingParams
from mlx_mtp.models.drafter import Candidates
from mlx_mtp.spec_decode.loop import DecodeState, decode_round, draft, first_token, padded, prefill_chunk
from mlx_mtp.spec_decode.sampler import Sampler


def prefilled(kind: str, prompts: list[list[int]], sampling: list[SamplingParams] | None = None) -> DecodeState:
    target, _ = golden_pair(kind)
    width = target.config.text.hidden_size
    sampler = Sampler.of(sampling or [SamplingParams()] * len(prompts))
    rows = len(prompts)
    state = DecodeState(mx.zeros((rows,), mx.int32), mx.zeros((rows, width)), new_cache(target, rows), sampler)
    for start in range(0, max(map(len, prompts)), 11):
        state, _ = prefill_chunk(target, state, *padded([prompt[start : start + 11] for prompt in prompts]))
    return first_token(target, state)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_equals_transformers(kind: str) -> None:
    target, drafter = golden_pair(kind)
    for length in (7, 20):
        prompt = golden(kind)[f"greedy.{length}.prompt"].tolist()
        for num_draft_tokens in (0, 3):
            request = decode(target, drafter, [prompt], [SamplingParams(24)], num_draft_tokens)[0]
            assert request.tokens == golden(kind)[f"greedy.{length}.tokens"].tolist()


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 4, 7])
def test_the_newest_token_is_never_in_the_cache(num_draft_tokens: int) -> None:
    """Each round commits accepted + 1 positions; the hidden state is the one before the newest token."""
    target, drafter = golden_pair("edge")
    prompts = random_prompts(1, 3, 30, 256)
    state = prefilled("edge", prompts)
    texts = [[*prompt, int(token)] for prompt, token in zip(prompts, state.last_token.tolist(), strict=True)]
    for _ in range(12):
        state, output = decode_round(target, drafter, state, num_draft_tokens)
        for row, (*tokens, accepted) in enumerate(output.packed.tolist()):
            texts[row] += tokens[: accepted + 1]
        assert state.cache.lengths.tolist() == [len(text) - 1 for text in texts]
        assert state.last_token.tolist() == [text[-1] for text in texts]
    for row, text in enumerate(texts):
        context = mx.array([text[:-1]])
        hidden = target(context, new_cache(target).stage(context.size, mx.array([context.size])))
        assert mx.abs(hidden[0, -1] - state.hidden[row]).max().item() < 1e-4


@pytest.mark.parametrize("num_draft_tokens", [1, 3, 7])
def test_each_row_keeps_what_it_accepted_itself(num_draft_tokens: int) -> None:
    """Replayed drafts that are right or wrong by plan: rows accept exactly up to their own first wrong draft."""
    target, _ = golden_pair("dense")
    prompts = [prompt[:9] + [7] * (9 - len(prompt)) for prompt in random_prompts(2, 4, 9, 256)]
    sampling = [SamplingParams(60, temperature=0.8, seed=row) for row in range(4)]
    texts = [[*prompt, *decode(target, None, [prompt], [one])[0].tokens]
             for prompt, one in zip(prompts, sampling, strict=True)]
    correct = np.random.default_rng(0).random((4, 69)) < np.array([[0.0], [0.5], [0.9], [1.0]])
    replay = ReplayDrafter(np.array(texts), correct, 256)
    state = prefilled("dense", prompts, sampling)
    positions = [9] * 4
    for _ in range(6):
        state, output = decode_round(target, replay, state, num_draft_tokens)
        for row, (*tokens, accepted) in enumerate(output.packed.tolist()):
            planned = correct[row, positions[row] + 1 : positions[row] + 1 + num_draft_tokens]
            assert accepted == (num_draft_tokens if planned.all() else int(np.argmin(planned)))
            assert tokens[: accepted + 1] == texts[row][positions[row] + 1 : positions[row] + accepted + 2]
            positions[row] += accepted + 1


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_rejection_drafts_are_those_of_a_clean_context(kind: str) -> None:
    """transformers leaves a rejected draft's K/V visible to its drafter; here the next drafts must not know of it."""
    target, drafter = golden_pair(kind)
    prompt = random_prompts(4, 1, 60, 256)[0]
    state, text, rejections = prefilled(kind, [prompt]), [*prompt], 0
    text.append(int(state.last_token.item()))
    for _ in range(15):
        state, output = decode_round(target, drafter, state, 5)
        *tokens, accepted = output.packed[0].tolist()
        text += tokens[: accepted + 1]
        rejections += accepted < 5
        clean = prefilled(kind, [text[:-1]])
        assert clean.last_token.item() == text[-1]
        assert draft(target, drafter, state, 5, None).tolist() == draft(target, drafter, clean, 5, None).tolist()
    assert rejections > 5


class Mirror:
    """A drafter that scores as the target did in a recorded text: its draws must be the target's, noise and all."""

    def __init__(self, logits: mx.array, candidates_only: bool) -> None:
        self._logits, self._candidates_only = logits, candidates_only

    def context(self, keys_values: object, key_positions: object, newest_positions: mx.array) -> list[int]:
        return [int(newest_positions[0].item())]

    def __call__(self, embedding: mx.array, hidden: mx.array, context: list[int]) -> tuple[Candidates, mx.array]:
        logits = self._logits[context[0]][None]
        context[0] += 1
        if not self._candidates_only:
            return Candidates(logits), hidden
        order = mx.argsort(-logits, axis=-1)[:, ::-1]  # all tokens, in an order that is not their ids'
        return Candidates(mx.take_along_axis(logits, order, axis=-1), order), hidden


@pytest.mark.parametrize("candidates_only", [False, True])
def test_a_drafter_that_scores_like_the_target_draws_like_it(candidates_only: bool) -> None:
    """Same noise at the same position for both, gathered by token id where only candidates are scored."""
    target, _ = golden_pair("dense")
    prompt, sampling = [2, 7, 9], SamplingParams(40, temperature=1.3, top_k=100, top_p=0.99, seed=5)
    text = [*prompt, *decode(target, None, [prompt], [sampling])[0].tokens]
    tokens = mx.array([text])
    logits = target.logits(target(tokens, new_cache(target).stage(tokens.size, mx.array([tokens.size]))))[0]
    state = prefilled("dense", [prompt], [sampling])
    for _ in range(8):
        state, output = decode_round(target, Mirror(logits, candidates_only), state, 3)  # type: ignore[arg-type]
        assert output.packed[0, -1].item() == 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_first_token_is_drawn_with_the_noise_of_its_own_position(temperature: float) -> None:
    """As if it had been decoded: prefill of a shorter prompt and one plain round give the same token."""
    target, _ = golden_pair("unified")
    sampling = SamplingParams(3, temperature=temperature, seed=11)
    for prompt in random_prompts(6, 8, 30, 256):
        tokens = decode(target, None, [prompt], [sampling])[0].tokens
        assert decode(target, None, [[*prompt, tokens[0]]], [sampling])[0].tokens[:2] == tokens[1:]


def test_ragged_pieces_are_padded_on_the_right_and_counted() -> None:
    tokens, valid = padded([[3, 4], [], [9]])
    assert tokens.tolist() == [[3, 4], [0, 0], [9, 0]]
    assert valid.tolist() == [2, 0, 1]
