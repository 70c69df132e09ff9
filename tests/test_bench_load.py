"""The load test and the pairs of real shapes: reproducible, right by numpy, and small enough to be tried here."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from bench import load, real_shapes, rounds
from bench.bandwidth import Bandwidth
from bench.load import LoadConfig, Percentiles, arrivals
from bench.medium_pair import drafter_config, text_config
from bench.model_bytes import DrafterModel, TargetModel, family_target, modules
from bench.prompts import RANDOM, random_prompts
from bench.runners import Ours
from bench.sweep import NoPeers, Sweep, SweepConfig
from mlx_mtp import Pair
from mlx_mtp.config import DrafterConfig, QuantizationConfig, TargetConfig
from mlx_mtp.errors import RequestError
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target


def test_arrivals_are_the_same_for_the_same_seed_and_come_at_the_rate_asked_for() -> None:
    config = LoadConfig(clients=4, requests=2000, rate=8.0, seed=3)
    times = arrivals(config)
    assert times == arrivals(config)
    assert times != arrivals(LoadConfig(clients=4, requests=2000, rate=8.0, seed=4))
    assert all(one == sorted(one) for one in times)
    gaps = np.diff(np.array(times), axis=1)
    assert gaps.mean() == pytest.approx(4 / 8.0, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # as exponential ones have it
    assert np.median(gaps) == pytest.approx(np.log(2) * 4 / 8.0, rel=0.07)


def test_percentiles_are_numpys() -> None:
    values = np.random.default_rng(0).exponential(size=101).tolist()
    found = Percentiles.of(values)
    assert found is not None
    ordered = sorted(values)
    assert (found.p50, found.p90, found.p99) == pytest.approx((ordered[50], ordered[90], ordered[99]))
    assert (found.p50, found.p90, found.p99) == tuple(np.percentile(values, [50, 90, 99]))
    assert Percentiles.of([]) is None


def test_a_short_load_ends_with_every_request_answered_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--clients", "3", "--requests", "3", "--rate", "2000", "--max-tokens", "4", "--max-rows", "2",
             "--num-draft-tokens", "2", "--max-waiting", "2", "--output", str(tmp_path)]
    assert load.main(flags) == 0
    record = json.loads((tmp_path / "load.json").read_text())
    assert record["finished"] + record["refused"] == 9
    assert record["refused"] > 0
    assert 0 < record["mean_rows"] <= 2
    assert record["ttft_ms"]["p50"] <= record["ttft_ms"]["p90"] <= record["ttft_ms"]["p99"]
    assert f"{record['refused']} refused" in capsys.readouterr().out
    assert load.main(["--rate", "0"]) == 2
    assert capsys.readouterr().err.startswith("error: clients, requests")


SMALL = {"vocab_size": 2048, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
SETTINGS = QuantizationConfig(64, 4)


@pytest.fixture(scope="module")
def scaled_down() -> tuple[TargetModel, DrafterModel]:
    """The 26B-A4B's form at a thousandth of its size."""
    text = text_config(5, 5, **SMALL, intermediate_size=256, enable_moe_block=True, num_experts=8, top_k_experts=2,
                       moe_intermediate_size=64)
    config = TargetConfig.from_json({"model_type": "gemma4", "text_config": text})
    small = drafter_config()
    small["backbone_hidden_size"] = SMALL["hidden_size"]
    small["text_config"] |= {**SMALL, "intermediate_size": 128}
    drafting = DrafterConfig.from_json(small)
    rules = family_target("26B-A4B", 4).rules
    target = TargetModel("26B-A4B", config, modules(Target(config)), SETTINGS, rules)
    return target, DrafterModel(target, drafting, modules(Drafter(drafting)), SETTINGS)


@pytest.fixture(scope="module")
def random_pair(scaled_down: tuple[TargetModel, DrafterModel]) -> Pair:
    return real_shapes.random_pair(*scaled_down, mx.float32)


def test_a_random_pair_is_quantized_by_the_recipe_without_its_floats_in_memory(
    scaled_down: tuple[TargetModel, DrafterModel]
) -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    pair = real_shapes.random_pair(*scaled_down, mx.float32)
    peak = mx.get_peak_memory() - before
    assert pair.drafter is not None
    models = (pair.target, pair.drafter)
    kept = sum(array.nbytes for model in models for _, array in tree_flatten(model.parameters()))
    floats = [module.weights * 4 for model in scaled_down for module in model.modules.values()]
    assert peak < kept + 3 * max(floats) < sum(floats)
    experts = pair.target.layers[0].experts.switch_glu.gate_proj
    assert (experts.bits, pair.target.layers[0].router.proj.bits) == (4, 8)
    assert isinstance(pair.drafter.layers[0].mlp.up_proj, nn.QuantizedLinear)


def test_a_random_pairs_text_is_the_script_and_acceptance_is_what_was_asked_for(
    random_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "BLOCK", 1)
    config = SweepConfig(rows=(2,), num_draft_tokens=(3,), prompts=(RANDOM,), context=(12,), max_tokens=16, runs=1,
                         acceptance=0.8)
    one = Sweep(random_pair, config, Bandwidth(10.0, 8.0), NoPeers())
    one.check(lambda text: None)
    plain = Ours(random_pair, None, 0, random_prompts(RANDOM, 1, 12))
    for cell in one.measure(lambda text: None):
        assert all(runner.difference is None for runner in cell.runners)
        assert cell.runners[1].acceptance_at[0] == pytest.approx(0.8, abs=0.25)
    for prompt in random_prompts(RANDOM, 1, 12):
        text = [token for step in plain.steps([prompt], 20) for _, token in step]
        assert text == random_pair.target.text_after(prompt, len(text))


def test_each_acceptance_is_recorded_in_a_folder_of_its_own(
    random_pair: Pair, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(real_shapes, "shaped_pair", lambda *shapes: random_pair)
    flags = "--rows 1 --num-draft-tokens 1 --max-tokens 6 --runs 1 --no-plots --no-calibration --acceptance 0.5 1"
    assert real_shapes.main(["26b-a4b", *flags.split(), "--output", str(tmp_path / "new")]) == 0
    for acceptance in ("0.5", "1"):
        record = json.loads((tmp_path / f"new/acceptance-{acceptance}/decode.json").read_text(encoding="utf-8"))
        assert record["settings"]["acceptance"] == float(acceptance)


def test_the_script_walks_through_the_whole_vocabulary_but_what_is_left_out() -> None:
    successors = real_shapes.cycle(50, frozenset({3, 7}), seed=1)
    token, seen = 0, set()
    for _ in range(48):
        token = int(successors[token])
        seen.add(token)
    assert seen == set(range(50)) - {3, 7}


def test_only_numbers_of_layers_that_end_with_a_full_one_are_taken() -> None:
    whole = family_target("26B-A4B", 4)
    assert len(real_shapes.first_layers(whole, 12).config.text.layers) == 12
    with pytest.raises(RequestError, match="layers is 7; expected one of 6, 12, 18, 24, 30"):
        real_shapes.first_layers(whole, 7)
    with pytest.raises(RequestError, match="model is '70B'; expected one of E2B"):
        real_shapes.family_name("70B")
    assert real_shapes.family_name("26b-a4b") == "26B-A4B"
