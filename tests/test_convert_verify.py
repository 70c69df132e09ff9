"""What a conversion cost is measured from the files alone, and a wrong tensor, wherever it is, shows in the report."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from support import GOLDENS, KINDS
from tower_checkpoints import tower_shapes, write_target

from mlx_mtp import demo, device
from mlx_mtp.api import Pair, score
from mlx_mtp.checkpoint.loader import QUANTIZABLE, load_drafter, load_target, parse_config, read_json
from mlx_mtp.checkpoint.weights import Part, tower_name, written_name
from mlx_mtp.config import TargetConfig
from mlx_mtp.convert import tensor_errors
from mlx_mtp.convert.drafting import compare_drafting, same_beginning
from mlx_mtp.convert.report import ClassErrors, Report, table
from mlx_mtp.convert.teacher_forced import Text, compare, hidden_states
from mlx_mtp.convert.tensor_errors import class_errors, tower_errors
from mlx_mtp.convert.towers import to_mlx_layout
from mlx_mtp.convert.verify import PROMPTS, no_progress, sample_prompts, sample_text, verify
from mlx_mtp.errors import CheckpointError, RequestError
from mlx_mtp.models.decoder_layer import DecoderLayer
from mlx_mtp.models.target import Target
from mlx_mtp.tokenizer import Tokenizer

TEXT = Text([(7 * i * i + 3 * i) % 256 for i in range(48)], "a test's")
MODES = [("affine", 32, 4), ("affine", 64, 8), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]
Arrays = dict[str, mx.array]


def rewritten(
    source: Path, folder: Path, part: Part = "target", change: Callable[[Arrays], object] = lambda arrays: None
) -> Path:
    """The same weights in mlx-lm's names, experts apart, after `change` by their paths inside."""
    model = load_target(source)[0] if part == "target" else load_drafter(source)
    arrays = dict(tree_flatten(model.parameters()))
    change(arrays)
    shutil.copytree(source, folder)
    mx.save_safetensors(str(folder / "model.safetensors"), {written_name(p, part): a for p, a in arrays.items()})
    return folder


def quantized(source: Path, folder: Path, part: Part = "target", bits: int = 4, group: int = 32,
              mode: str = "affine") -> Path:
    """All that can be, but for tables of 8 bits and a drafter's centroid head, as a converter would write it."""
    model = load_target(source)[0] if part == "target" else load_drafter(source)
    settings: dict[str, Any] = {"group_size": group, "bits": bits, "mode": mode}
    written = dict(settings)

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not isinstance(module, QUANTIZABLE) or module.weight.shape[-1] % group or path.startswith("masked"):
            return False
        if path.startswith("embed_tokens") or "router" in path:
            written[written_name(path, part)] = {"group_size": 32, "bits": 8, "mode": "affine"}
            return {"group_size": 32, "bits": 8, "mode": "affine"}
        return dict(settings)

    nn.quantize(model, class_predicate=choose)
    shutil.copytree(source, folder)
    arrays = {written_name(path, part): array for path, array in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    config = read_json(folder / "config.json") | {"quantization": written}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def by_class(rows: Sequence[ClassErrors]) -> dict[str, ClassErrors]:
    return {row.name: row for row in rows}


def times(path: str, factor: float) -> Callable[[Arrays], object]:
    return lambda arrays: arrays.update({path: arrays[path] * factor})


@pytest.mark.parametrize("kind", KINDS)
def test_renaming_and_splitting_alone_moves_nothing(kind: str, tmp_path: Path) -> None:
    """Fused experts against split ones among them: gate above up."""
    for part in ("target", "drafter"):
        source = GOLDENS / kind / ("target" if part == "target" else "assistant")
        rows = class_errors(source, rewritten(source, tmp_path / part, part), part, no_progress)
        assert [row.worst_error for row in rows] == [0.0] * len(rows)
        assert {row.part for row in rows} == {part}
        model = load_target(source)[0] if part == "target" else load_drafter(source)
        assert sum(row.numbers for row in rows) == sum(array.size for _, array in tree_flatten(model.parameters()))


def test_a_scaled_tensor_has_exactly_that_error_and_its_class_names_it(tmp_path: Path) -> None:
    path = "layers.2.mlp.down_proj.weight"
    output = rewritten(GOLDENS / "dense/target", tmp_path / "scaled", change=times(path, 0.5))
    rows = by_class(class_errors(GOLDENS / "dense/target", output, "target", no_progress))
    assert rows["mlp"].worst_error == pytest.approx(0.5, rel=1e-6)
    assert rows["mlp"].worst == "language_model.model.layers.2.mlp.down_proj"
    assert rows["mlp"].mean_error == pytest.approx(0.5 / rows["mlp"].modules, rel=1e-6)
    assert rows["mlp"].modules == 27
    assert rows["mlp"].formats == {"bfloat16": 27}
    assert rows["mlp"].bits == 16
    assert [row.worst_error for name, row in rows.items() if name != "mlp"] == [0.0] * (len(rows) - 1)


def test_swapped_gate_and_up_of_one_layers_experts_show(tmp_path: Path) -> None:
    gate, up = (f"layers.3.experts.switch_glu.{name}_proj.weight" for name in ("gate", "up"))

    def swap(arrays: Arrays) -> None:
        arrays[gate], arrays[up] = arrays[up], arrays[gate]

    source = GOLDENS / "mixture/target"
    output = rewritten(source, tmp_path / "swapped", change=swap)
    experts = by_class(class_errors(source, output, "target", no_progress))["experts"]
    assert "layers.3.experts" in experts.worst
    assert experts.worst_error > 1  # two matrices that have nothing to do with each other are sqrt(2) apart
    assert compare(source, output, TEXT, no_progress).kl > 1e-3


def test_a_tensor_of_zeros_that_is_none_any_more_is_all_error(tmp_path: Path) -> None:
    path = "layers.0.post_attention_layernorm.weight"
    source = rewritten(GOLDENS / "dense/target", tmp_path / "zero", change=times(path, 0))
    assert by_class(class_errors(source, source, "target", no_progress))["norms and scalars"].worst_error == 0
    rows = by_class(class_errors(source, GOLDENS / "dense/target", "target", no_progress))
    assert rows["norms and scalars"].worst_error == 1


def test_nan_in_the_output_is_the_worst_there_is(tmp_path: Path) -> None:
    output = rewritten(GOLDENS / "dense/target", tmp_path / "nan", change=lambda arrays: arrays.update(
        {"layers.4.mlp.up_proj.weight": arrays["layers.4.mlp.up_proj.weight"] * math.nan}))
    mlp = by_class(class_errors(GOLDENS / "dense/target", output, "target", no_progress))["mlp"]
    assert mlp.worst == "language_model.model.layers.4.mlp.up_proj"
    assert math.isnan(mlp.worst_error)


@pytest.mark.parametrize(("mode", "group", "bits"), MODES)
def test_errors_of_quantized_tensors_are_those_of_whole_dequantized_ones(
    mode: str, group: int, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With pieces of a few rows, so that they begin and end anywhere within an expert."""
    source = GOLDENS / "mixture/target"
    output = quantized(source, tmp_path / "output", bits=bits, group=group, mode=mode)
    before, after = load_target(source, mx.float32)[0], load_target(output, mx.float32)[0]
    expected: dict[str, float] = {}
    originals = dict(before.named_modules())
    for path, module in after.named_modules():
        if "scales" in module and "experts" in path:
            whole = mx.dequantize(module.weight, module.scales, module.get("biases"), module.group_size, module.bits,
                                  mode=module.mode, dtype=mx.float32)
            one, other = (np.array(array).astype(np.float64) for array in (originals[path].weight, whole))
            expected[path] = math.sqrt(np.square(other - one).sum() / np.square(one).sum())
    monkeypatch.setattr(tensor_errors, "CHUNK_NUMBERS", 64 * 7)
    experts = by_class(class_errors(source, output, "target", no_progress))["experts"]
    assert expected
    assert experts.worst_error == pytest.approx(max(expected.values()), rel=1e-5)
    assert experts.mean_error == pytest.approx(sum(expected.values()) / experts.modules, rel=1e-5)
    assert experts.formats[f"{mode} {bits} bits, groups of {group}"] == len(expected)
    if len(expected) == experts.modules:  # 64 does not divide some experts' columns
        assert experts.bits == pytest.approx(bits + (32 if mode == "affine" else 8) / group)


def test_a_missing_and_a_misshapen_tensor_are_errors_that_name_it(tmp_path: Path) -> None:
    source = GOLDENS / "dense/target"
    output = rewritten(source, tmp_path / "missing", change=lambda arrays: arrays.pop("norm.weight"))
    with pytest.raises(CheckpointError, match=r"missing: tensor language_model\.model\.norm\.weight is missing"):
        class_errors(source, output, "target", no_progress)
    with pytest.raises(CheckpointError, match="the other checkpoint has it: convert again"):
        class_errors(source, GOLDENS / "edge/target", "target", no_progress)


def with_towers(source: Path, folder: Path, change: Callable[[Arrays], object]) -> Path:
    """The tensors of `source` in mlx-lm's names with vision and audio in MLX's layout, after `change` to those."""
    stored = mx.load(str(source / "model.safetensors"))
    assert isinstance(stored, dict)
    towers = {name: to_mlx_layout(name, array) for old, array in stored.items()
              if (name := tower_name(old)) is not None}
    change(towers)
    rewritten(source, folder)
    mx.save_safetensors(str(folder / "model-vision.safetensors"), towers)
    return folder


def test_kept_vision_and_audio_tensors_are_compared_too_whatever_their_layout(tmp_path: Path) -> None:
    source = write_target("edge", tmp_path / "source")
    assert tower_errors(source, rewritten(source, tmp_path / "without"), no_progress) == ()
    [row] = tower_errors(source, with_towers(source, tmp_path / "kept", lambda towers: None), no_progress)
    assert (row.name, row.worst_error) == ("vision and audio", 0.0)
    path = next(name for name in tower_shapes("edge") if "depthwise_conv1d" in name).removeprefix("model.")
    [row] = tower_errors(source, with_towers(source, tmp_path / "scaled", times(path, 2)), no_progress)
    assert (row.worst, row.worst_error) == (path, 1.0)
    output = with_towers(source, tmp_path / "lost", lambda towers: towers.pop(path))
    with pytest.raises(CheckpointError, match=f"lost: tensor {path} is missing"):
        tower_errors(source, output, no_progress)


def whole_forward(folder: Path) -> mx.array:
    """Logits of all positions from a model that is held as a whole."""
    return score(Pair(load_target(folder, mx.float32)[0], None, None, 4096), list(TEXT.tokens))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_and_kl_are_those_of_the_plain_whole_forward(kind: str, tmp_path: Path) -> None:
    source = GOLDENS / kind / "target"
    output = quantized(source, tmp_path / "output")
    one, other = (np.array(whole_forward(folder)).astype(np.float64)[:-1] for folder in (source, output))
    logs = [logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True) for logits in (one, other)]
    following = np.array(TEXT.tokens[1:])
    nats = [-log_probs[np.arange(len(following)), following].mean() for log_probs in logs]
    kl = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean()
    got = compare(source, output, TEXT, no_progress)
    assert math.log(got.source_perplexity) == pytest.approx(nats[0], abs=1e-5)
    assert math.log(got.output_perplexity) == pytest.approx(nats[1], abs=1e-5)
    assert got.kl == pytest.approx(kl, abs=1e-5)
    assert got.kl > 1e-3
    assert got.top1_agreement == pytest.approx((one.argmax(-1) == other.argmax(-1)).mean())
    assert (got.tokens, got.positions, got.dtype) == (48, 47, "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_is_no_nats_from_itself(kind: str) -> None:
    got = compare(GOLDENS / kind / "target", GOLDENS / kind / "target", TEXT, no_progress)
    assert (got.kl, got.top1_agreement) == (0.0, 1.0)
    assert got.source_perplexity == got.output_perplexity


def test_one_scaled_layer_shows_in_kl_and_agreement(tmp_path: Path) -> None:
    source = GOLDENS / "edge/target"
    output = rewritten(source, tmp_path / "scaled", change=times("layers.1.layer_scalar", 3.0))
    got = compare(source, output, TEXT, no_progress)
    assert got.kl > 0.01
    assert got.top1_agreement < 1


def wide_checkpoint(folder: Path, layers: int) -> Path:
    """A dense one of random weights whose layers and embedding are large beside everything else: 6 MB and 34 MB."""
    config = read_json(GOLDENS / "dense/target/config.json")
    kinds = ["sliding_attention"] * (layers - 1) + ["full_attention"]
    config["text_config"] |= {"num_hidden_layers": layers, "layer_types": kinds, "vocab_size": 2**16,
                              "hidden_size": 128, "intermediate_size": 4096}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = load_random(folder)
    arrays = {written_name(path, "target"): array.astype(mx.bfloat16) for path, array in model}
    mx.save_safetensors(str(folder / "model.safetensors"), arrays)
    return folder


def load_random(folder: Path) -> list[tuple[str, mx.array]]:
    config = parse_config(folder, TargetConfig.from_json, read_json(folder / "config.json"))
    return tree_flatten(Target(config).parameters())


def test_a_streamed_forward_holds_one_layer_and_the_texts_rows_of_the_embedding(tmp_path: Path) -> None:
    count = 6
    folder = wide_checkpoint(tmp_path / "wide", count)
    layer, embedding = 3 * 128 * 4096 * 4, 2**16 * 128 * 4
    mx.synchronize()
    mx.clear_cache()
    base, held = mx.get_active_memory(), []
    mx.reset_peak_memory()
    tokens = TEXT.tokens[:16]  # few, so that what they make is small beside a layer
    hidden_states(folder, tokens, lambda what, done, total: held.append(mx.get_active_memory() - base))
    peak = mx.get_peak_memory() - base
    assert len(held) == count
    assert max(held) < layer / 2  # when a layer is done, nothing of it is left
    assert layer < peak < 2.5 * layer  # one in float32, and its tensors as they are stored
    assert peak < embedding


def test_a_layers_weights_are_read_before_anything_runs_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Mac's GPU must not be handed work that waits for the disk."""
    events: list[str] = []
    evaluate, run = mx.eval, DecoderLayer.finish

    def reading(*arrays: Any) -> None:
        events.extend("read" for each in arrays if isinstance(each, dict) and "input_layernorm" in each)
        evaluate(*arrays)

    def running(*given: Any) -> mx.array:
        events.append("run")
        return run(*given)

    monkeypatch.setattr(mx, "eval", reading)
    monkeypatch.setattr(DecoderLayer, "finish", running)
    folder = GOLDENS / "dense/target"
    hidden_states(folder, TEXT.tokens[:8], no_progress)
    assert events == ["read", "run"] * len(load_target(folder)[0].layers)


def test_a_checkpoint_without_tokenizer_is_compared_on_random_tokens_and_the_report_says_so(tmp_path: Path) -> None:
    source, output = GOLDENS / "edge/target", quantized(GOLDENS / "edge/target", tmp_path / "o")
    drafter = quantized(GOLDENS / "edge/assistant", tmp_path / "o-assistant", "drafter")
    steps: list[tuple[str, int, int]] = []
    report = verify(source, output, GOLDENS / "edge/assistant", drafter,
                    progress=lambda *step: steps.append(step))
    assert report.text.text == "random tokens of seed 0, for there is no tokenizer"
    assert report.text.tokens == 200
    assert report.drafting is not None
    assert report.drafting.prompts_from == report.text.text
    assert report.drafting.before is not None
    assert report.drafting.after is not None
    assert report.drafting.before.rounds > 0
    assert report.drafting.same_answers is not None
    assert {row.part for row in report.tensors} == {"target", "drafter"}
    assert Report.from_json(report.to_json()) == report
    for what in dict.fromkeys(what for what, _, _ in steps):
        ends = [done == total for name, done, total in steps if name == what]
        assert ends[-1], what
    with pytest.raises(RequestError, match=r"has no tokenizer: copy its tokenizer\.json there"):
        verify(source, output, GOLDENS / "edge/assistant", drafter, prompts=["Hello"])


def test_without_drafters_there_is_nothing_said_of_drafting() -> None:
    report = verify(GOLDENS / "dense/target", GOLDENS / "dense/target")
    assert report.drafting is None
    assert "mean acceptance length" not in table(report)


def test_a_source_that_does_not_fit_is_not_drafted_with_and_the_report_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, assistant = quantized(demo.TARGET, tmp_path / "edge-4bit"), demo.TARGET.with_name("edge-assistant")
    tokenizer, config = Tokenizer(demo.TARGET), load_target(demo.TARGET)[0].config.text
    prompts = sample_prompts(tokenizer, config, demo.TARGET, ["Explain `bisect.insort`."])
    monkeypatch.setattr(device, "memory_bytes", lambda: 10_000_000)
    drafting = compare_drafting((demo.TARGET, assistant), (output, assistant), prompts, no_progress)
    assert drafting.before is None
    assert drafting.after is not None
    assert drafting.after.rounds > 0
    assert (drafting.kept, drafting.same_answers) == (None, None)
    assert drafting.note is not None
    assert re.search(r"not measured before: the pair needs 0\.01 GB, but the device has 0\.01 GB", drafting.note)


def test_answers_are_compared_up_to_their_first_different_token() -> None:
    assert same_beginning([5, 6, 7, 8], [5, 6, 9, 8]) == 0.5
    assert same_beginning([5, 6], [5, 6, 7, 8]) == 0.5
    assert same_beginning([], []) == 1.0
    assert same_beginning([], [5]) == 0.0


def test_the_bundled_text_is_prose_and_code_in_the_checkpoints_own_tokens() -> None:
    tokenizer = Tokenizer(demo.TARGET)
    config = load_target(demo.TARGET)[0].config.text
    text = sample_text(tokenizer, config)
    assert text.name == "the bundled sample text"
    assert 500 <= len(text.tokens) <= 640
    decoded = tokenizer.decode(text.tokens)
    assert "harbour" in decoded
    assert "def missing_boxes" in decoded


def test_prompts_are_the_held_out_ones_for_the_built_in_pairs_and_else_bundled_or_given(tmp_path: Path) -> None:
    tokenizer = Tokenizer(demo.TARGET)
    config = load_target(demo.TARGET)[0].config.text
    own = sample_prompts(tokenizer, config, demo.TARGET, None)
    assert (len(own.tokens), own.name) == (55, "the built-in pairs' held-out ones")
    assert own.stop_tokens == tokenizer.stop_tokens
    assert len(sample_prompts(tokenizer, config, tmp_path, None).tokens) == len(PROMPTS)
    given = sample_prompts(tokenizer, config, demo.TARGET, ["Hello"])
    assert list(given.tokens) == [tokenizer.encode_chat([{"role": "user", "content": "Hello"}])]
    for wrong in ([], ["long " * 5000]):
        with pytest.raises(RequestError, match=r"expected at least one prompt, and each with at most \d+ tokens"):
            sample_prompts(tokenizer, config, demo.TARGET, wrong)
