"""The promise: drafting never changes the text. Plain decoding of each row alone is the oracle."""

import mlx.core as mx
import pytest
from lossless import Tally, compare, plain
from support import KINDS, decode, golden_pair, random_prompts

from mlx_mtp import demo
from mlx_mtp.checkpoint.loader import load_drafter, load_target, materialize
from mlx_mtp.config import SamplingParams
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target

WINDOWS = 5
# Tokens a row, by rows in the batch: most come from the large batch, which is cheap.
RANDOM_TOKENS = {1: 12, 3: 16, 8: 76}
TRAINED_TOKENS = {1: 12, 3: 16, 8: 32}
ALL_K = range(8)


def share(length: int, num_draft_tokens: int) -> int:
    """Of `length` tokens a row for each K: most go to small K, whose rounds are cheap."""
    return round(length * (1.7 if num_draft_tokens <= 3 else 0.3))


def load(name: str) -> tuple[Target, Drafter]:
    if name in KINDS:
        return golden_pair(name)
    folder = {"trained edge": demo.TARGET, "trained mixture": demo.MIXTURE_TARGET}[name]
    target, _ = load_target(folder, mx.float32)
    drafter = load_drafter(folder.with_name(f"{folder.name}-assistant"), mx.float32)
    materialize(target, "target", folder)
    materialize(drafter, "drafter", folder)
    return target, drafter


def settings(temperature: float, count: int, max_tokens: int) -> list[SamplingParams]:
    return [SamplingParams(max_tokens, temperature, 64, 0.95, seed=1000 + i) for i in range(count)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", [*KINDS, "trained edge", "trained mixture"])
def test_no_token_differs_from_plain_decoding_for_any_k_and_any_batch(name: str, temperature: float) -> None:
    """Over all its cases 52,864 tokens are compared; each case must reject its 1,000 drafts."""
    target, drafter = load(name)
    text = target.config.text
    tokens_by_batch = RANDOM_TOKENS if name in KINDS else TRAINED_TOKENS
    prompts = random_prompts(7, 8, WINDOWS * text.window, text.vocab_size)
    expected = plain(target, prompts, settings(temperature, 8, share(max(tokens_by_batch.values()), 0)))
    tally = Tally()
    for num_draft_tokens in ALL_K:
        for batch, most in tokens_by_batch.items():
            length = share(most, num_draft_tokens)
            compare(tally, f"{name}, batch of {batch}", target, drafter, prompts[:batch],
                    settings(temperature, batch, length), [text[:length] for text in expected[:batch]],
                    num_draft_tokens)
    tally.check()
    assert tally.tokens == sum(batch * share(most, k) for k in ALL_K for batch, most in tokens_by_batch.items())
    assert tally.rejected >= 1_000, "a test in which nothing is rejected proves nothing"
    print(f"{name}, temperature {temperature}: {tally}")


@pytest.mark.parametrize("name", ["dense", "trained edge"])
def test_a_row_keeps_its_text_whoever_its_neighbours_are(name: str) -> None:
    target, drafter = load(name)
    text = target.config.text
    prompts = random_prompts(3, 6, 3 * text.window, text.vocab_size)
    mixed = [SamplingParams(20 + 4 * i, temperature=i % 3 * 0.7, top_k=i % 2 * 20, top_p=1 - 0.1 * i, min_p=0.01 * i,
                            seed=i) for i in range(6)]
    alone = plain(target, prompts, mixed)
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [2, 2, 2, 1, 1, 4]):
        batch = decode(target, drafter, [prompts[i] for i in order], [mixed[i] for i in order], num_draft_tokens=3)
        assert [request.tokens for request in batch] == [alone[i] for i in order]


def test_the_seed_decides_the_text_and_nothing_else_does() -> None:
    target, drafter = load("trained edge")
    prompt = random_prompts(5, 1, 40, target.config.text.vocab_size)[0]
    texts = {}
    for seed in range(4):
        sampling = [SamplingParams(40, 1.0, 64, 0.95, seed=seed)]
        runs = [decode(target, d, [prompt], sampling, k)[0].tokens for d, k in ((None, 0), (drafter, 2), (drafter, 7))]
        assert runs[0] == runs[1] == runs[2]
        texts[seed] = tuple(runs[0])
    assert len(set(texts.values())) == 4
