"""Round trips with mlx-lm and mlx-vlm, where they are installed (the `peers` extra): what their converters write runs
here, what ours writes runs there, and the logits are equal.

Both sides compute in float32 from the numbers on disk, so a quantized checkpoint must agree as well as a plain one:
what differs is rounding alone. The prompt is longer than the window, and the drafter's context shorter: past the window
mlx-vlm's drafter sees two keys fewer than transformers', which is no matter of files.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from support import KINDS, golden, golden_pair, new_cache, relative_error
from test_drafter import STEPS, donor_arrays
from tower_checkpoints import newest_config, text_only, tower_shapes, write_drafter, write_target

from mlx_mtp.checkpoint.loader import load_drafter, load_target
from mlx_mtp.convert.__main__ import main as convert

mlx_vlm = pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (the peers extra)")
mlx_lm = pytest.importorskip("mlx_lm")
load_vlm_drafter = pytest.importorskip("mlx_vlm.speculative.drafters").load_drafter

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and mlx-vlm's own are not ours to mend

TOLERANCE = 1e-5
POSITION = 15  # of the newest token of a drafter's context: the window holds all before it
# Groups of 64 leave every width of 32 as it is; groups of 32 fit everywhere.
MODES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "8-bit": {"q_bits": 8, "q_group_size": 64, "q_mode": "affine"},
    "4-bit": {"q_bits": 4, "q_group_size": 32, "q_mode": "affine"},
    "mxfp4": {"q_bits": 4, "q_group_size": 32, "q_mode": "mxfp4"},
}
Change = Callable[[nn.Module], nn.Module]
LOADERS: dict[str, Callable[[str], tuple[nn.Module, Any]]] = {"mlx-lm": mlx_lm.load, "mlx-vlm": mlx_vlm.load}
CONVERTERS: dict[str, Callable[..., None]] = {
    "mlx-lm": mlx_lm.convert,
    "mlx-vlm": pytest.importorskip("mlx_vlm.convert").convert,
}

every_kind = pytest.mark.parametrize("kind", KINDS)
every_mode = pytest.mark.parametrize("mode", MODES)
every_peer = pytest.mark.parametrize("peer", LOADERS)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the Hugging Face checkpoints `<kind>` and `<kind>-assistant` of all kinds."""
    folder = tmp_path_factory.mktemp("sources")
    for kind in KINDS:
        write_target(kind, folder / kind)
        write_drafter(kind, folder / f"{kind}-assistant")
    return folder


def ours(source: Path, output: Path, mode: str, *flags: str) -> Path:
    """Converts a pair with our command, towers kept; returns the target's folder, beside which is `...-assistant`."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in MODES[mode].items()]
    quantize = ["--quantize", *options] if options else []
    arguments = ["--hf-path", str(source), "--mlx-path", str(output), "--keep-towers", "--no-verify", *quantize, *flags]
    assert convert(arguments) == 0
    return output


def theirs(peer: str, source: Path, output: Path, mode: str) -> Path:
    CONVERTERS[peer](str(source), str(output), quantize=bool(MODES[mode]), **MODES[mode])
    return output


def as_float32(model: nn.Module) -> nn.Module:
    """The model with its floating-point arrays, scales and biases among them, widened; packed numbers stay."""
    def widen(array: mx.array) -> mx.array:
        return array.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else array

    model.update(tree_map(widen, model.parameters()))
    return model


def with_plain_embeddings(model: nn.Module) -> nn.Module:
    """The model with its quantized embeddings written out in float32: what mlx reads from one in mxfp4 is bfloat16,
    exact by itself but rounded again when it is scaled, in a model that computes in float32 otherwise."""
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedEmbedding):
            plain = nn.Embedding(1, 1)
            plain.weight = module(mx.arange(module.num_embeddings)).astype(mx.float32)
            model.update_modules(tree_unflatten([(path, plain)]))
    return model


def our_logits(folder: Path, tokens: mx.array) -> mx.array:
    target, _ = load_target(folder, mx.float32)
    hidden = target(tokens[None], new_cache(target).stage(tokens.size, mx.array([tokens.size])))
    return target.logits(hidden)[0]


def their_logits(peer: str, folder: Path, tokens: mx.array, change: Change = as_float32) -> mx.array:
    model, _ = LOADERS[peer](str(folder))
    result = change(model)(tokens[None])
    return (result.logits if peer == "mlx-vlm" else result)[0]


def assert_same_target(kind: str, peer: str, folder: Path) -> None:
    tokens = golden(kind)["target.48.tokens"]
    assert relative_error(our_logits(folder, tokens), their_logits(peer, folder, tokens)) <= TOLERANCE


@functools.cache
def their_target(source: Path) -> nn.Module:
    return as_float32(mlx_vlm.load(str(source))[0])


def their_drafts(kind: str, drafter: Any, source: Path) -> tuple[mx.array, list[mx.array]]:
    """Tokens [STEPS] and each step's logits [V] of mlx-vlm's drafter on the golden context, beside its own target."""
    arrays, seen = golden(kind), []

    def sampler(logits: mx.array) -> mx.array:
        seen.append(logits[0, 0])
        return mx.argmax(logits, axis=-1)

    drafter.reset(their_target(source))
    drafter.set_shared_kv(donor_arrays(kind, POSITION), POSITION)
    newest, hidden = arrays[f"drafter.{POSITION}.context"][-1], arrays[f"drafter.{POSITION}.hidden"]
    tokens = drafter.draft_block(int(newest.item()), hidden[None, None], None, STEPS + 1, sampler)
    return tokens[0], seen


def assert_same_drafter(kind: str, folder: Path, drafter: Any, source: Path) -> None:
    """Each chained step of ours, from mlx-vlm's tokens, scores its candidates as mlx-vlm does."""
    tokens, expected = their_drafts(kind, drafter, source)
    target, _ = golden_pair(kind)
    arrays, keys_values = golden(kind), donor_arrays(kind, POSITION)
    our_drafter = load_drafter(folder, mx.float32)
    slots = {attention: mx.arange(POSITION)[None] for attention in keys_values}
    context = our_drafter.context(keys_values, slots, mx.array([POSITION]))
    token, hidden = arrays[f"drafter.{POSITION}.context"][-1:], arrays[f"drafter.{POSITION}.hidden"][None]
    for step in range(STEPS):
        candidates, hidden = our_drafter(target.embed(token), hidden, context)
        ids = mx.arange(expected[step].size) if candidates.token_ids is None else candidates.token_ids[0]
        assert relative_error(candidates.logits[0], expected[step][ids]) <= TOLERANCE, f"step {step}"
        token = tokens[step : step + 1]
        assert ids[mx.argmax(candidates.logits[0])].item() == token.item(), f"step {step}"


@every_mode
@every_peer
@every_kind
def test_a_target_they_converted_gives_their_logits_here(
    kind: str, peer: str, mode: str, sources: Path, tmp_path: Path
) -> None:
    assert_same_target(kind, peer, theirs(peer, sources / kind, tmp_path / "X", mode))


@every_mode
@every_kind
def test_a_drafter_they_converted_gives_their_drafts_here(
    kind: str, mode: str, sources: Path, tmp_path: Path
) -> None:
    folder = theirs("mlx-vlm", sources / f"{kind}-assistant", tmp_path / "X-assistant", mode)
    drafter = as_float32(load_vlm_drafter(str(folder))[0])
    if kind == "edge":  # see the last test
        with_plain_embeddings(drafter)
    assert_same_drafter(kind, folder, drafter, sources / kind)


@every_mode
@every_kind
def test_a_pair_we_converted_gives_our_logits_and_drafts_there(
    kind: str, mode: str, sources: Path, tmp_path: Path
) -> None:
    folder = ours(sources / kind, tmp_path / "X", mode)
    for peer in LOADERS:
        assert_same_target(kind, peer, folder)
    drafter_folder = folder.with_name("X-assistant")
    assert_same_drafter(kind, drafter_folder, as_float32(load_vlm_drafter(str(drafter_folder))[0]), sources / kind)


@every_kind
def test_what_the_newest_config_spelling_leaves_out_is_written_for_them(kind: str, tmp_path: Path) -> None:
    source = write_target(kind, tmp_path / "new", newest_config(kind, "target"))
    write_drafter(kind, tmp_path / "new-assistant", newest_config(kind, "assistant"))
    folder = ours(source, tmp_path / "X", "bf16")
    for peer in LOADERS:
        assert_same_target(kind, peer, folder)
    drafter_folder = folder.with_name("X-assistant")
    assert_same_drafter(kind, drafter_folder, as_float32(load_vlm_drafter(str(drafter_folder))[0]), folder)


@pytest.mark.parametrize("mode", ["bf16", "4-bit"])
@every_kind
def test_towers_we_kept_are_those_that_mlx_vlm_reads_from_the_source(
    kind: str, mode: str, sources: Path, tmp_path: Path
) -> None:
    """On disk already as mlx-vlm names them and lays them out: earlier versions of it mend nothing of format "mlx"."""
    folder = ours(sources / kind, tmp_path / "X", mode)
    models = [mlx_vlm.load(str(path))[0] for path in (sources / kind, folder)]
    source, output = (dict(tree_flatten(model.parameters())) for model in models)
    stored = {name: array for file in folder.glob("*.safetensors") for name, array in mx.load(str(file)).items()}
    towers = [name for name in source if not name.startswith("language_model.")]
    assert len(towers) == len(tower_shapes(kind))
    for name in towers:
        assert source[name].dtype == stored[name].dtype, name
        assert mx.array_equal(source[name], stored[name]), name
        assert mx.array_equal(source[name], output[name]), name


@every_peer
@every_kind
def test_without_towers_they_load_the_text_part_all_the_same(
    kind: str, peer: str, sources: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "X"
    assert convert(["--hf-path", str(sources / kind), "--mlx-path", str(folder), "--no-verify"]) == 0
    assert_same_target(kind, peer, folder)


@every_peer
@every_kind
def test_a_text_model_alone_becomes_one_they_load(kind: str, peer: str, tmp_path: Path) -> None:
    """Hugging Face's text-only checkpoints have other names and a flat config, which mlx-lm knows only partly."""
    folder = tmp_path / "X"
    assert convert(["--hf-path", str(text_only(kind, tmp_path / kind)), "--mlx-path", str(folder), "--no-verify"]) == 0
    assert_same_target(kind, peer, folder)


@pytest.mark.parametrize("flags", [["--dequantize", "--dtype", "float32"], []], ids=["dequantized", "as it is"])
@pytest.mark.parametrize("mode", ["4-bit", "mxfp4"])
@pytest.mark.parametrize("kind", ["mixture", "edge"])
def test_what_they_quantized_stands_for_the_same_numbers_after_passing_here(
    kind: str, mode: str, flags: list[str], sources: Path, tmp_path: Path
) -> None:
    """Experts, and an audio embedding which mlx-vlm quantizes though it leaves towers alone, among them."""
    quantized, folder = theirs("mlx-vlm", sources / kind, tmp_path / "Q", mode), tmp_path / "X"
    arguments = ["--hf-path", str(quantized), "--mlx-path", str(folder), "--keep-towers", "--no-draft", "--no-verify"]
    assert convert([*arguments, *flags]) == 0
    assert ("quantization" in json.loads((folder / "config.json").read_text())) is not bool(flags)
    tokens = golden(kind)["target.48.tokens"]

    def change(model: nn.Module) -> nn.Module:
        return with_plain_embeddings(as_float32(model))

    expected = their_logits("mlx-vlm", quantized, tokens, change)
    for peer in LOADERS:
        assert relative_error(their_logits(peer, folder, tokens, change), expected) <= TOLERANCE


def test_why_an_edge_drafters_embedding_stays_unquantized_mlx_vlm_reads_packed_numbers_as_weights(
    sources: Path, tmp_path: Path
) -> None:
    """Its centroid head gathers rows of `embed_tokens.weight` itself. When this test fails, mlx-vlm was mended."""
    folder = theirs("mlx-vlm", sources / "edge-assistant", tmp_path / "X-assistant", "4-bit")
    with pytest.raises(ValueError, match="reshape"):
        their_drafts("edge", load_vlm_drafter(str(folder))[0], sources / "edge")
