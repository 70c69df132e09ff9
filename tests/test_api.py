"""The Python interface: every form of prompt, every setting, streams that add up, scores that are the target's."""

import mlx.core as mx
import pytest
from support import KINDS, golden, golden_pair, relative_error

import mlx_mtp
from mlx_mtp import Pair, RequestError, Result, SamplingParams, demo
from mlx_mtp.tokenizer import Tokenizer

PROMPT = "Explain `os.path.join`."


@pytest.fixture(scope="module")
def pair() -> Pair:
    return mlx_mtp.load(dtype=mx.float32)


def test_no_model_loads_the_built_in_pair_and_says_so(pair: Pair) -> None:
    assert pair.drafter is not None
    assert any("built-in" in note for note in pair.notes)


def test_a_prompt_is_text_or_token_ids(pair: Pair) -> None:
    tokens = pair.tokenizer.encode(PROMPT)
    from_text = mlx_mtp.generate(pair, PROMPT, max_tokens=12)
    from_tokens = mlx_mtp.generate(pair, tokens, max_tokens=12)
    assert isinstance(from_text, Result)
    assert isinstance(from_tokens, Result)
    assert from_text.tokens == from_tokens.tokens
    assert from_text.text == pair.tokenizer.decode(from_text.tokens)
    assert from_text.stats.prompt_tokens == len(tokens)


def test_a_list_of_prompts_is_one_batch_with_results_in_order(pair: Pair) -> None:
    prompts = [PROMPT, pair.tokenizer.encode("Write Python: Return a list."), "import os\n"]
    batch = mlx_mtp.generate(pair, prompts, max_tokens=15, num_draft_tokens=2)
    assert isinstance(batch, list)
    for prompt, result in zip(prompts, batch, strict=True):
        alone = mlx_mtp.generate(pair, prompt, max_tokens=15, num_draft_tokens=0)
        assert isinstance(alone, Result)
        assert (result.text, result.tokens) == (alone.text, alone.tokens)


def test_one_prompt_in_a_list_gives_a_list(pair: Pair) -> None:
    assert isinstance(mlx_mtp.generate(pair, [PROMPT], max_tokens=2), list)


def test_the_stream_adds_up_to_the_result(pair: Pair) -> None:
    segments = list(mlx_mtp.stream_generate(pair, [PROMPT, "def f("], max_tokens=30, temperature=0.8, seed=3))
    for index in (0, 1):
        mine = [segment for segment in segments if segment.index == index]
        result = mine[-1].result
        assert result is not None
        assert all(segment.result is None for segment in mine[:-1])
        assert "".join(segment.text for segment in mine) == result.text
        assert [token for segment in mine for token in segment.tokens] == result.tokens
        assert mine[-1].finish_reason == result.finish_reason
        assert mine[-1].stats == result.stats


@pytest.mark.parametrize("num_draft_tokens", [0, 3, 7])
def test_a_stop_string_ends_text_and_tokens_at_the_same_place_for_any_k(pair: Pair, num_draft_tokens: int) -> None:
    whole = mlx_mtp.generate(pair, PROMPT, max_tokens=40)
    stop = whole.text[10:13]
    results = [mlx_mtp.generate(pair, PROMPT, max_tokens=40, stop=stop, num_draft_tokens=k)
               for k in (0, num_draft_tokens)]
    assert results[0].text == results[1].text == whole.text[: whole.text.index(stop)]
    assert results[0].tokens == results[1].tokens == whole.tokens[: len(results[0].tokens)]
    assert results[1].finish_reason == "stop"


def test_rows_can_have_settings_of_their_own(pair: Pair) -> None:
    rows = [SamplingParams(5), SamplingParams(9, temperature=1.0, seed=4), SamplingParams(7, stop=("e",))]
    batch = mlx_mtp.generate(pair, [PROMPT] * 3, sampling=rows)
    assert isinstance(batch, list)
    for row, result in zip(rows, batch, strict=True):
        alone = mlx_mtp.generate(pair, PROMPT, sampling=row)
        assert (alone.tokens, alone.text) == (result.tokens, result.text)


@pytest.mark.parametrize(("settings", "message"), [
    ({"temprature": 1.0}, "temprature"),
    ({"temperature": -1}, "temperature"),
    ({"num_draft_tokens": 8}, "num_draft_tokens"),
    ({"num_draft_tokens": -1}, "num_draft_tokens"),
    ({"sampling": [SamplingParams()] * 2}, "2 entries for 1 prompts"),
    ({"max_tokens": 0}, "max_tokens"),
])
def test_impossible_settings_raise_before_anything_runs(pair: Pair, settings: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        mlx_mtp.stream_generate(pair, PROMPT, **settings)


@pytest.mark.parametrize("prompt", ["", [], [2, 5000], [2, -1]])
def test_impossible_prompts_raise(pair: Pair, prompt: object) -> None:
    with pytest.raises(RequestError):
        mlx_mtp.generate(pair, prompt)  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", KINDS)
def test_score_gives_the_targets_logits_of_every_position(kind: str) -> None:
    target, _ = golden_pair(kind)
    pair = Pair(target, None, Tokenizer(demo.TARGET), 4096)
    tokens = golden(kind)["target.96.tokens"].tolist()
    for chunk in (512, 13):
        logits = mlx_mtp.score(pair, tokens, chunk=chunk)
        assert logits.shape == (96, 256)
        assert logits.dtype == mx.float32
        assert relative_error(logits, golden(kind)["target.96.logits"]) <= 2e-5


def test_plain_decoding_follows_the_scores(pair: Pair) -> None:
    tokens = pair.tokenizer.encode(PROMPT)
    result = mlx_mtp.generate(pair, tokens, max_tokens=20)
    assert isinstance(result, Result)
    logits = mlx_mtp.score(pair, [*tokens, *result.tokens])
    assert mx.argmax(logits[len(tokens) - 1 : -1], axis=-1).tolist() == result.tokens
