"""Tokens that a checkpoint's generation_config.json rules out never come, and all else is as it was."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from pathlib import Path

import mlx.core as mx
import pytest
from support import GOLDENS, decode, golden_pair, random_prompts

from mlx_mtp import CheckpointError, api, score
from mlx_mtp.check.replay import Text, replay
from mlx_mtp.checkpoint.loader import load_drafter, load_target
from mlx_mtp.config import SamplingParams
from mlx_mtp.engine.request import Request
from mlx_mtp.models.target import Target

FOLDER = GOLDENS / "unified"
PROMPTS = random_prompts(5, 3, 30, 256)
SAMPLING = [SamplingParams(24), SamplingParams(24, temperature=1.0, seed=3),
            SamplingParams(24, temperature=0.8, top_k=20, top_p=0.9, seed=4)]


@pytest.fixture(scope="module")
def suppressed() -> list[int]:
    """What comes often otherwise."""
    requests = decode(golden_pair("unified")[0], None, PROMPTS, SAMPLING)
    common = Counter(token for request in requests for token in request.tokens).most_common(4)
    return [token for token, _ in common]


def target_with(folder: Path, suppress_tokens: object) -> Target:
    shutil.copytree(FOLDER / "target", folder)
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": suppress_tokens}))
    return load_target(folder, mx.float32)[0]


def pair_of(target: Target) -> api.Pair:
    return api.Pair(target, None, None, 4096)  # type: ignore[arg-type]


def oracle(target: Target, prompt: list[int], suppressed: list[int], count: int) -> list[int]:
    """Greedy, the whole text anew for every token."""
    text = list(prompt)
    for _ in range(count):
        logits = score(pair_of(target), text)[-1]
        ranked = mx.argsort(-logits).tolist()
        text.append(next(token for token in ranked if token not in suppressed))
    return text[len(prompt) :]


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_they_never_come_and_the_next_best_does(num_draft_tokens: int, suppressed: list[int], tmp_path: Path) -> None:
    target = target_with(tmp_path / "target", suppressed)
    drafter = load_drafter(FOLDER / "assistant", mx.float32)
    requests: list[Request] = decode(target, drafter, PROMPTS, SAMPLING, num_draft_tokens)
    assert not {token for request in requests for token in request.tokens} & {*suppressed}
    assert requests[0].tokens == oracle(golden_pair("unified")[0], PROMPTS[0], suppressed, 24)
    assert [request.tokens for request in requests] == [
        decode(target, None, [prompt], [sampling])[0].tokens
        for prompt, sampling in zip(PROMPTS, SAMPLING, strict=True)]
    assert all(replay(target, Text.of(request), 1e-4).is_plain for request in requests)


def test_scores_know_nothing_of_it(suppressed: list[int], tmp_path: Path) -> None:
    targets = target_with(tmp_path / "target", suppressed), golden_pair("unified")[0]
    logits = [score(pair_of(target), PROMPTS[0]) for target in targets]
    assert mx.allclose(*logits, atol=1e-5).item()


@pytest.mark.parametrize("nothing", [None, []])
def test_none_are_none(nothing: object, tmp_path: Path) -> None:
    target = target_with(tmp_path / "target", nothing)
    hidden = mx.ones((1, target.config.text.hidden_size))
    assert mx.array_equal(target.logits(hidden), target.choice_logits(hidden)).item()


@pytest.mark.parametrize("bad", [7, "7", [7, "x"], [True], [-1], [256]])
def test_what_is_no_list_of_token_ids_is_refused(bad: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json: suppress_tokens is .*; expected token ids "
                                              r"below 256: copy the file from the original checkpoint"):
        target_with(tmp_path / "target", bad)


def test_they_never_come_on_another_thread(suppressed: list[int], tmp_path: Path) -> None:
    target = target_with(tmp_path / "target", suppressed)
    mx.eval(target.parameters())
    tokens: list[int] = []

    def work() -> None:
        mx.set_default_device(mx.cpu)
        tokens.extend(decode(target, None, PROMPTS[:1], SAMPLING[:1])[0].tokens)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(tokens) == 24
    assert not {*tokens} & {*suppressed}
