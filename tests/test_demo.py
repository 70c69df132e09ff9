"""The built-in pairs: small, whole, licensed, and worth shipping."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_mtp
from mlx_mtp import Pair, Result, demo

FOLDER = Path(demo.__file__).parent
MOST_BYTES = 6_000_000


@pytest.mark.parametrize("target", [demo.TARGET, demo.MIXTURE_TARGET])
def test_a_pair_takes_at_most_six_megabytes(target: Path) -> None:
    folders = (target, target.with_name(f"{target.name}-assistant"))
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) <= MOST_BYTES


def test_card_and_the_corpus_licence_are_there() -> None:
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in (FOLDER / "LICENSE-corpus.txt").read_text()
    assert "form of an answer" in (FOLDER / "README.md").read_text().replace("\n", " ")


def test_every_layer_scales_its_output_so_that_a_port_that_forgets_it_fails() -> None:
    for target in (demo.TARGET, demo.MIXTURE_TARGET):
        weights = mx.load(str(target / "model.safetensors"))
        assert isinstance(weights, dict)
        scalars = [array.item() for name, array in weights.items() if name.endswith("layer_scalar")]
        assert scalars
        assert all(abs(scalar - 1) > 0.01 for scalar in scalars)


def mean_acceptance_length(pair: Pair, count: int) -> float:
    """At K = 3 on the first held-out prompts whose greedy answers end by themselves, as one batch."""
    listed = json.loads((FOLDER / "heldout_prompts.json").read_text())
    texts = [entry["prompt"] for entry in listed if entry["stops"]][:count]
    prompts = [pair.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    results = mlx_mtp.generate(pair, prompts, max_tokens=200, num_draft_tokens=3)
    assert isinstance(results, list)
    ended = [result for result in results if result.finish_reason == "stop"]
    assert len(ended) >= count / 2
    return 1 + sum(r.stats.accepted for r in ended) / sum(r.stats.rounds for r in ended)


@pytest.mark.parametrize("target", [demo.TARGET, demo.MIXTURE_TARGET])
def test_drafts_are_accepted_on_held_out_prompts(target: Path) -> None:
    assert mean_acceptance_length(mlx_mtp.load(target, dtype=mx.float32), 16) >= 2.6


def test_the_answer_has_the_form_of_an_answer_and_ends_by_itself() -> None:
    pair = mlx_mtp.load()
    question = pair.tokenizer.encode_chat([{"role": "user", "content": "Explain `bisect.insort`."}])
    result = mlx_mtp.generate(pair, question)
    assert isinstance(result, Result)
    assert result.finish_reason == "stop"
    assert "insort" in result.text
    assert len(result.text.split()) >= 8
