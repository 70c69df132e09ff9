"""The Python interface: every form of prompt, every setting, streams that add up, scores that are the target's."""

import re
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support import KINDS, golden, golden_pair, relative_error

import mlx_mtp
from mlx_mtp import MemoryBudgetError, Pair, PairError, RequestError, Result, SamplingParams, api, demo, device
from mlx_mtp.api import check, new_engine, new_request, stream_requests
from mlx_mtp.engine.prefix_cache import PrefixCache
from mlx_mtp.engine.request import Request
from mlx_mtp.generate import main
from mlx_mtp.models.expert_dispatch import DispatchPlan
from mlx_mtp.models.moe import SwitchGLU
from mlx_mtp.tokenizer import Tokenizer

PROMPT = "Explain `os.path.join`."


@pytest.fixture(scope="module")
def pair() -> Pair:
    return mlx_mtp.load(dtype=mx.float32)


class Unending(Tokenizer):
    """Knows no stop token, so that an answer is as long as it may be, whatever the demonstration pair has learnt."""

    @property
    def stop_tokens(self) -> frozenset[int]:
        return frozenset()


@pytest.fixture(scope="module")
def unending(pair: Pair) -> Pair:
    return replace(pair, tokenizer=Unending(demo.TARGET))


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


@pytest.mark.parametrize("max_rows", [1, 2])
def test_prompts_beyond_the_rows_follow_when_rows_come_free_with_the_same_text(pair: Pair, max_rows: int) -> None:
    prompts = [PROMPT, "import os\n", "def f(", "class A:", "x ="]
    together = mlx_mtp.generate(pair, prompts, max_tokens=9, temperature=1.0)
    order: list[int] = []
    for segment in mlx_mtp.stream_generate(pair, prompts, max_tokens=9, temperature=1.0, max_rows=max_rows):
        order.append(segment.index)
        if segment.result is not None:
            assert segment.result.tokens == together[segment.index].tokens
    first = {index: order.index(index) for index in range(5)}
    last = {index: len(order) - 1 - order[::-1].index(index) for index in range(5)}
    for index in range(5):  # never more than max_rows between their first and their last tokens
        assert sum(first[other] < first[index] < last[other] for other in range(5)) < max_rows


def test_requests_are_taken_when_they_can_run_and_dropped_when_they_end(pair: Pair) -> None:
    taken: list[weakref.ref[Request]] = []

    def requests() -> Iterator[Request]:
        for i in range(12):
            request = new_request(pair, f"x{i} =", SamplingParams(3, seed=i))
            taken.append(weakref.ref(request))
            yield request

    engine = new_engine(pair, max_rows=2)
    done = alive = 0
    for segment in stream_requests(pair, engine, requests()):
        done += segment.result is not None
        alive = max(alive, sum(request() is not None for request in taken))
        assert len(taken) <= done + 2 * 2 + 2
    assert (done, len(taken)) == (12, 12)
    assert alive <= 8


def test_a_prompt_that_the_device_cannot_hold_is_refused_before_anything_runs(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sum(array.nbytes for model in (pair.target, pair.drafter)
                  for _, array in tree_flatten(model.parameters()))
    monkeypatch.setattr(device, "memory_bytes", lambda: int((weights + 1_500_000) / 0.95))
    for refuse in (mlx_mtp.stream_generate, check):
        with pytest.raises(MemoryBudgetError, match="a prompt of 3000 tokens"):
            refuse(pair, [[2], [2] * 3000])


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
def test_a_stop_string_ends_text_and_tokens_at_the_same_place_for_any_k(
    unending: Pair, num_draft_tokens: int
) -> None:
    whole = mlx_mtp.generate(unending, PROMPT, max_tokens=40)
    assert len(whole.tokens) == 40
    middle = len(whole.text) // 2
    stop = whole.text[middle : middle + 3]
    assert len(stop) == 3
    results = [mlx_mtp.generate(unending, PROMPT, max_tokens=40, stop=stop, num_draft_tokens=k)
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
    ({"max_rows": 0}, "max_rows is 0"),
    ({"sampling": [SamplingParams()] * 2}, "2 entries for 1 prompts"),
    ({"max_tokens": 0}, "max_tokens"),
])
def test_impossible_settings_raise_before_anything_runs(pair: Pair, settings: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        mlx_mtp.stream_generate(pair, PROMPT, **settings)


@pytest.mark.parametrize(("setting", "meant"), [
    ("temp", "temperature"), ("n_draft", "num_draft_tokens"), ("max_new_tokens", "max_tokens"), ("nonsense", None),
])
def test_an_unknown_setting_comes_with_the_one_that_was_meant(pair: Pair, setting: str, meant: str | None) -> None:
    with pytest.raises(RequestError, match=f"unknown setting '{setting}'; ") as refusal:
        mlx_mtp.generate(pair, PROMPT, **{setting: 1})
    found = re.search(r"did you mean (\w+)\?", str(refusal.value))
    assert (found and found[1]) == meant


def test_what_an_engine_does_not_know_raises(pair: Pair) -> None:
    with pytest.raises(RequestError, match=r"unknown engine setting 'rows'; expected one of .*max_rows"):
        new_engine(pair, rows=2)
    with pytest.raises(RequestError, match="sampling is None; expected a SamplingParams"):
        new_request(pair, PROMPT, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, [{"seed": 1}], "greedy", None, 0.7])
def test_sampling_of_another_type_raises(pair: Pair, sampling: object) -> None:
    with pytest.raises(RequestError, match=r"sampling is .*; expected a SamplingParams, or a list with one for each"):
        mlx_mtp.generate(pair, PROMPT, sampling=sampling)


MESSAGE = {"role": "user", "content": "Hi"}
CONVERSATION = r"pass pair\.tokenizer\.encode_chat\(messages\)"
EMPTY = "is empty: expected text or at least one token id"
NO_PROMPT, NO_IDS = "expected text or a list of token ids", "expected token ids, which are whole numbers"
IMPOSSIBLE = [
    ("", EMPTY), ([], EMPTY), ([[]], EMPTY), (["a", ""], EMPTY), (np.array([]), EMPTY),
    ([2, 5000], "token 5000; expected ids from 0"), ([2, -1], "token -1; expected ids from 0"),
    ([MESSAGE], CONVERSATION), (MESSAGE, CONVERSATION), ([[MESSAGE], [MESSAGE]], CONVERSATION),
    (None, "a prompt is None; " + NO_PROMPT), (b"Hi", "a prompt is b'Hi'; " + NO_PROMPT), (3, NO_PROMPT),
    (np.array(3), NO_PROMPT), (iter([2, 3]), NO_PROMPT), ({2, 3}, NO_PROMPT),
    (["a", 3], "a prompt is 3; " + NO_PROMPT), ([3, "a"], "a prompt is 3; " + NO_PROMPT),
    ([2, 2.7], f"holds 2.7; {NO_IDS}"), (np.array([2.0, 3.0]), NO_IDS), (mx.array([2.5]), NO_IDS),
    ([2, True], NO_IDS), ([2, None], f"holds None; {NO_IDS}"), ([b"Hi"], NO_IDS), (np.zeros((1, 1, 1), int), NO_IDS),
]


@pytest.mark.parametrize(("prompt", "message"), IMPOSSIBLE)
def test_impossible_prompts_raise(pair: Pair, prompt: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        mlx_mtp.generate(pair, prompt)  # type: ignore[call-overload]


def test_a_conversation_runs_once_it_is_encoded_as_advised(pair: Pair) -> None:
    assert mlx_mtp.generate(pair, pair.tokenizer.encode_chat([MESSAGE]), max_tokens=2).stats.prompt_tokens > 2


@pytest.mark.parametrize("form", [
    tuple, np.array, mx.array, lambda ids: list(np.array(ids)), lambda ids: list(mx.array(ids)), lambda ids: np.array(
        ids, np.uint16),
])
def test_token_ids_may_be_of_any_array(pair: Pair, form: Callable[[list[int]], object]) -> None:
    tokens = pair.tokenizer.encode(PROMPT)
    expected = mlx_mtp.generate(pair, tokens, max_tokens=5).tokens
    assert mlx_mtp.generate(pair, form(tokens), max_tokens=5).tokens == expected
    batch = mlx_mtp.generate(pair, [form(tokens), PROMPT], max_tokens=5)
    assert [result.tokens for result in batch] == [expected, expected]
    assert mx.array_equal(mlx_mtp.score(pair, form(tokens)), mlx_mtp.score(pair, PROMPT))


def test_an_array_of_two_rows_is_a_batch(pair: Pair) -> None:
    tokens = pair.tokenizer.encode(PROMPT)
    for array in (np.array([tokens, tokens]), mx.array([tokens, tokens])):
        assert len(mlx_mtp.generate(pair, array, max_tokens=2)) == 2


def test_a_prompt_too_long_for_the_asked_context_says_whose_limit_that_is_and_raising_it_helps(pair: Pair) -> None:
    tokens = [2] * 12
    asked = replace(pair, max_context=12)
    with pytest.raises(RequestError, match=r"max_context \(--max-context\) was set to 12, the answer incl.* raise"):
        mlx_mtp.generate(asked, tokens)
    assert mlx_mtp.generate(replace(pair, max_context=13), tokens).stats.generation_tokens <= 1
    assert mlx_mtp.score(asked, tokens).shape[0] == 12
    with pytest.raises(RequestError, match=r"13 tokens; max_context \(--max-context\) was set to 12: shorten"):
        mlx_mtp.score(asked, [2] * 13)
    with pytest.raises(RequestError, match=r"the model's context holds 4096: shorten the prompt$"):
        mlx_mtp.score(asked, [2] * 4097)


@pytest.mark.parametrize(("tokens", "chunk", "message"), [
    ([2, 10**6], 512, "token 1000000; expected ids from 0"), ([2, -5], 512, "token -5; expected ids"), ([], 512, EMPTY),
    ([2, 2.5], 512, NO_IDS), ([2], 0, "chunk is 0; expected a whole number of at least 1"), ([2], -1, "chunk is -1"),
    ([2], 2.0, r"chunk is 2\.0"), ([2], True, "chunk is True"),
])
def test_what_cannot_be_scored_raises(pair: Pair, tokens: object, chunk: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        mlx_mtp.score(pair, tokens, chunk=chunk)  # type: ignore[arg-type]


@pytest.mark.parametrize("draft_model", [None, "none"])
def test_none_is_no_drafter_by_either_spelling(draft_model: str | None) -> None:
    pair = mlx_mtp.load(demo.TARGET, draft_model)
    assert pair.drafter is None
    assert pair.notes == ()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"model": ""}, "the model's name is empty"), ({"draft_model": ""}, "the draft model's name is empty"),
    ({"model": 123}, "the model is 123; expected a folder or a Hub name"),
    ({"draft_model": False}, "the draft model is False; expected a folder"),
    ({"max_context": "4096"}, "max_context is '4096'; expected at least 2"),
    ({"max_context": 100.5}, r"max_context is 100\.5; expected at least 2"),
    ({"dtype": "float16"}, r"dtype is 'float16'; expected mx\.float32, mx\.float16 or mx\.bfloat16"),
    ({"dtype": mx.int8}, r"dtype is mlx\.core\.int8; expected mx\.float32"),
])
def test_what_names_nothing_to_load_raises(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        mlx_mtp.load(**arguments)  # type: ignore[arg-type]


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


def test_plain_decoding_follows_the_scores(unending: Pair) -> None:
    tokens = unending.tokenizer.encode(PROMPT)
    result = mlx_mtp.generate(unending, tokens, max_tokens=20)
    assert isinstance(result, Result)
    assert len(result.tokens) == 20
    logits = mlx_mtp.score(unending, [*tokens, *result.tokens])
    assert mx.argmax(logits[len(tokens) - 1 : -1], axis=-1).tolist() == result.tokens


def test_what_rounds_take_is_remembered_for_the_next_process_unless_the_user_forbids_it() -> None:
    first = mlx_mtp.load(max_context=512)
    assert first.calibration is not None
    mlx_mtp.generate(first, PROMPT, max_tokens=120)
    again = mlx_mtp.load(max_context=512)
    assert again.round_costs.is_known
    assert not mlx_mtp.load(max_context=512, calibrate=False).round_costs.is_known
    first.calibration.path.write_text("{broken")
    assert not mlx_mtp.load(max_context=512).round_costs.is_known
    key = api._costs_key(first)
    first.calibration.write(key, {"1": 7, "2": {"0": None, "1": "soon", "2": 0.0}, "4": [], "x": {"0": 1.0}})
    mlx_mtp.generate(first, PROMPT, max_tokens=20)
    written = first.calibration.read(key)
    assert written is not None
    assert isinstance(written["1"], dict), "what nobody can read is replaced, and ends no answer"
    assert len(written["1"]) > 0, "which K was timed often enough is a matter of time"
    assert min(written["1"].values()) > 0


def test_costs_of_rounds_are_kept_by_the_way_to_the_experts_too() -> None:
    mixture = mlx_mtp.load(demo.TARGET.with_name("mixture"), max_context=512, calibrate=False)
    keys = []
    for plan in (DispatchPlan(((0, "gather"),)), DispatchPlan(((0, "gather"), (9, "sorted")))):
        for module in mixture.target.modules():
            if isinstance(module, SwitchGLU):
                module.use_dispatch(plan)
        keys.append(api._costs_key(mixture))
    assert keys[0] != keys[1]


def test_what_a_single_prompt_begins_with_is_not_kept_for_others(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    monkeypatch.setattr(PrefixCache, "insert", lambda self, tokens, span: kept.append(span.stop))
    mlx_mtp.generate(pair, PROMPT, max_tokens=2)
    main(["--prompt", PROMPT, "--max-tokens", "2"])
    assert not kept
    for prompts in (["--prompt", "def f("], []):
        main(["--prompt", PROMPT, *prompts, "--max-tokens", "2"])
        assert bool(kept) == bool(prompts)
        kept.clear()
    mlx_mtp.generate(pair, [PROMPT, "def f("], max_tokens=2)
    assert len(kept) == 2


def test_a_result_says_what_plain_decoding_would_have_taken_once_a_round_of_it_was_timed(unending: Pair) -> None:
    fixed = mlx_mtp.generate(unending, PROMPT, max_tokens=40, num_draft_tokens=1)
    assert isinstance(fixed, Result)
    assert fixed.stats.plain_seconds is None
    measured = mlx_mtp.generate(unending, PROMPT, max_tokens=300)
    assert isinstance(measured, Result)
    assert measured.stats.plain_seconds is not None
    assert 0 < measured.stats.plain_seconds < 60


def test_a_cliff_is_feared_only_of_layers_that_metals_vector_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = mlx_mtp.load(draft_model=None).target.config.text
    narrow = min(layer.head_dim for layer in text.layers)
    shares = {layer.head_dim: text.num_heads // layer.num_kv_heads for layer in text.layers}
    assert len(shares) == 2
    asked: list[int] = []
    monkeypatch.setattr(device, "widest_block", lambda heads: asked.append(heads))
    for most in (narrow, max(shares), narrow - 1):
        monkeypatch.setattr(device, "VECTOR_HEAD_DIM", most)
        mlx_mtp.load(draft_model=None)
    assert asked == [shares[narrow], max(shares.values())]


def test_a_drafter_that_nobody_named_is_taken_only_if_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    edge, mixture = (demo.TARGET.with_name(f"{name}-assistant") for name in ("edge", "mixture"))
    monkeypatch.setattr(api, "find_drafter", lambda model: None)
    for guess, fits in ((edge, True), (mixture, False)):
        monkeypatch.setattr(api, "published_drafter", lambda model, guess=guess: guess)
        pair = mlx_mtp.load(demo.TARGET)
        assert (pair.drafter is not None) == fits
        assert any("no drafter found" in note for note in pair.notes) != fits
        assert any(f"{guess}" in note for note in pair.notes) != fits, "why that one was not taken"
    monkeypatch.setattr(api, "published_drafter", lambda model: demo.TARGET)  # no drafter at all
    assert mlx_mtp.load(demo.TARGET).drafter is None
    with pytest.raises(PairError):
        mlx_mtp.load(demo.TARGET, draft_model=mixture)
