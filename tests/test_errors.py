"""What a user can do wrong, and the one line that the command answers: what, where and what to do. Exit code 2."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_mtp import api, demo
from mlx_mtp.generate import main

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"
Arguments = Callable[[Path], list[str]]


def golden(folder: Path, kind: str = "dense", drafter: str | None = None) -> Path:
    """A golden target named X in `folder`, and a golden drafter named X-assistant beside it."""
    shutil.copytree(GOLDENS / kind / "target", folder / "X")
    shutil.copytree(GOLDENS / (drafter or kind) / "assistant", folder / "X-assistant")
    return folder / "X"


def built_in(folder: Path) -> Path:
    """The built-in target, which has a tokenizer, named X in `folder`."""
    return Path(shutil.copytree(demo.TARGET, folder / "X"))


def with_config(folder: Path, *, top: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Changes config.json: `settings` in the text part, `top` outside it."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config | (top or {})))
    return folder


def with_weights(folder: Path, change: Callable[[dict[str, mx.array]], object]) -> Path:
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    change(weights)
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def with_index(folder: Path, weight_map: object) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def with_file(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder


def truncated(folder: Path, keep: float) -> Path:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[: int(shard.stat().st_size * keep)])
    return folder


def quantized(folder: Path, **quantization: Any) -> Path:
    """One module quantized to 8 bits in groups of 32; what config.json says of it is up to the caller."""
    name = "model.language_model.layers.0.mlp.up_proj"

    def quantize(weights: dict[str, mx.array]) -> None:
        weights[f"{name}.weight"], weights[f"{name}.scales"], weights[f"{name}.biases"] = mx.quantize(
            weights[f"{name}.weight"], 32, 8)

    with_weights(folder, quantize)
    return with_config(folder, top={"quantization": quantization} if quantization else None)


def without_weights(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    return folder


def with_copy(folder: Path) -> Path:
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    return folder


def narrower_drafter(target: Path) -> Path:
    drafter = with_config(target.with_name("X-assistant"), top={"backbone_hidden_size": 32})
    with_weights(drafter, lambda weights: weights.update({
        "pre_projection.weight": weights["pre_projection.weight"][:, :64],
        "post_projection.weight": weights["post_projection.weight"][:32],
    }))
    return target


def smaller_vocabulary(target: Path) -> Path:
    drafter = with_config(target.with_name("X-assistant"), vocab_size=128)
    name = "model.embed_tokens.weight"
    with_weights(drafter, lambda weights: weights.update({name: weights[name][:128]}))
    return target


def put(name: str, value: Any) -> Callable[[dict[str, mx.array]], object]:
    """Changes one number of a tensor."""
    def change(weights: dict[str, mx.array]) -> None:
        weights[name][0] = value

    return change


def model(build: Callable[[Path], Path], *more: str) -> Arguments:
    return lambda folder: ["--model", str(build(folder)), "-p", "Hello", *more]


def flags(*arguments: str) -> Arguments:
    return lambda _: [*arguments, "-p", "Hello"] if "-p" not in arguments else list(arguments)


TRUNCATED = r"X/model\.safetensors is truncated or not a safetensors file: download it again"
UP = "model.language_model.layers.0.mlp.up_proj.weight"
NORM = "model.language_model.norm.weight"
TABLE: dict[str, tuple[Arguments, str]] = {
    # Folders and files
    "no folder": (model(lambda f: f / "nothing"), r"no folder .*nothing.* check the path"),
    "a file": (model(lambda f: with_file(f, "x.gguf", "") / "x.gguf"), r"x\.gguf is a file; expected a folder"),
    "no config": (model(lambda f: f), r"has no config\.json: expected a checkpoint's folder"),
    "config is not JSON": (model(lambda f: with_file(golden(f), "config.json", "{'a': 1}")),
                           r"X/config\.json cannot be read as JSON .*: download it again"),
    "config is a list": (model(lambda f: with_file(golden(f), "config.json", "[]")), r"holds a list; expected a JSON"),
    "no weights": (model(lambda f: without_weights(golden(f))), r"X has no \*\.safetensors files .*: download them"),
    "truncated weights": (model(lambda f: truncated(golden(f), 0.7)), TRUNCATED),
    "truncated header": (model(lambda f: truncated(golden(f), 0.001)), TRUNCATED),
    "empty weights": (model(lambda f: truncated(golden(f), 0)), TRUNCATED),
    "missing shard": (model(lambda f: with_index(golden(f), {"a": "model.safetensors", "b": "model-2.safetensors"})),
                      r"index\.json names model-2\.safetensors, which is not there: .* run it again"),
    "index of others": (model(lambda f: with_index(golden(f), {"a": "model-2.safetensors"})),
                        r"names model-2\.safetensors, .* of model\.safetensors it knows nothing: delete model.*json"),
    "shard missing beside another's": (
        model(lambda f: with_index(with_file(golden(f), "x.safetensors", ""), {"a": "model.safetensors", "b": "2.x"})),
        r"names 2\.x, which is not there: the download is incomplete, run it again"),
    "shard elsewhere": (model(lambda f: with_index(golden(f), {"a": "../x"})),
                        r"index\.json names the file '\.\./x'; expected the name of a file beside it"),
    "index without a map": (model(lambda f: with_index(golden(f), ["a"])), r"index\.json has no 'weight_map' .* again"),
    "index is not JSON": (model(lambda f: with_file(golden(f), "model.safetensors.index.json", "")),
                          r"index\.json cannot be read as JSON"),
    "tokenizer missing": (model(golden), r"X has no tokenizer\.json: copy it from the original"),
    "tokenizer damaged": (model(lambda f: with_file(golden(f), "tokenizer.json", '{"model": 1}')),
                          r"X: the tokenizer cannot be read .*: copy its files"),
    # Tensors
    "missing tensor": (model(lambda f: with_weights(golden(f), lambda weights: weights.pop(UP))),
                       r"X: tensor .*layers\.0\.mlp\.up_proj\.weight is missing: the download is incomplete"),
    "extra tensor": (model(lambda f: with_weights(golden(f), lambda w: w.update({"model.extra.weight": w[NORM]}))),
                     r"X/model\.safetensors: tensor .*extra\.weight is not part of the model .* check"),
    "wrong shape": (model(lambda f: with_weights(golden(f), lambda w: w.update({UP: w[UP][:-1]}))),
                    r"layers\.0\.mlp\.up_proj\.weight has shape \(63, 64\); expected \(64, 64\)"),
    "wrong type": (model(lambda f: with_weights(golden(f), lambda w: w.update({UP: w[UP].astype(mx.int8)}))),
                   r"layers\.0\.mlp\.up_proj\.weight holds int8; expected float32: convert"),
    "odd fused experts": (
        model(lambda f: with_weights(golden(f, "mixture"), lambda w: w.update(
            {"model.language_model.layers.0.experts.gate_up_proj": mx.zeros((8, 63, 64))}))),
        r"experts\.gate_up_proj has shape \(8, 63, 64\); expected an even number of rows"),
    "tensor in two shards": (
        model(lambda f: with_copy(golden(f))), r"tensor .* is there twice \(also in .*b\.safetensors\): delete"),
    "NaN": (model(lambda f: with_weights(built_in(f), put(UP, float("nan")))),
            r"X: tensor .*layers\.0\.mlp\.up_proj\.weight holds NaN or infinity: .* download or convert it again"),
    "infinity": (model(lambda f: with_weights(built_in(f), put(NORM, float("inf")))),
                 r"X: tensor .*norm\.weight holds NaN or infinity"),
    # Configs
    "unknown model type": (model(lambda f: with_config(golden(f), top={"model_type": "llama"})),
                           r"X/config\.json: model_type 'llama' is not supported as a target; expected one of gemma4,"),
    "own head": (model(lambda f: with_weights(with_config(golden(f), top={"tie_word_embeddings": False}),
                                              lambda w: w.update({"lm_head.weight": -w[NORM]}))),
                 r"X has a head of its own \(lm_head, .*\), which is not supported: expected a checkpoint whose"),
    "drafter as target": (model(lambda f: golden(f).with_name("X-assistant")),
                          r"'gemma4_assistant' .* \(this is a drafter: pass it as draft model\)"),
    "rope_type": (model(lambda f: with_config(golden(f), rope_parameters={"full_attention": {"rope_type": "yarn"}})),
                  r"rope_parameters\.full_attention\.rope_type is 'yarn'; expected 'default' or 'proportional'"),
    "activation": (model(lambda f: with_config(golden(f), hidden_activation="silu")),
                   r"X/config\.json: text_config\.hidden_activation is 'silu'; expected 'gelu_pytorch_tanh'"),
    "attention bias": (model(lambda f: with_config(golden(f), attention_bias=True)),
                       r"text_config\.attention_bias is True; expected False"),
    "layer type": (model(lambda f: with_config(golden(f), layer_types=["chunked_attention"] * 9)),
                   r"layer_types contains 'chunked_attention'; expected 'sliding_attention' or 'full_attention'"),
    "number of layer types": (model(lambda f: with_config(golden(f), layer_types=["full_attention"])),
                              r"layer_types has 1 entries; expected num_hidden_layers = 9"),
    "a size missing": (model(lambda f: with_config(golden(f), hidden_size=None)),
                       r"X/config\.json: text_config\.hidden_size is None; expected a whole number from 1 to"),
    "a value of a wrong kind": (model(lambda f: with_config(golden(f), num_kv_shared_layers="3")),
                                r"text_config\.num_kv_shared_layers is '3'; expected a whole number from 0 to 9"),
    "a size that is none": (model(lambda f: with_config(golden(f), vocab_size="x")),
                            r"text_config\.vocab_size is 'x'; expected a whole number from 1 to"),
    "a layer's size that is none": (model(lambda f: with_config(golden(f), global_head_dim=-32)),
                                    r"text_config\.global_head_dim is -32; expected a whole number from 1 to"),
    "a number that is none": (model(lambda f: with_config(golden(f), rms_norm_eps="small")),
                              r"text_config\.rms_norm_eps is 'small'; expected a number above 0"),
    # Quantization
    "quantization not in the config": (model(lambda f: quantized(golden(f))),
                                       r"up_proj\.scales is there, but config\.json has no 'quantization': use"),
    "group size that does not divide": (model(lambda f: quantized(golden(f), group_size=48, bits=8)),
                                        r"config\.json: group_size 48 does not divide the 64 columns of .*up_proj"),
    "group size zero": (model(lambda f: quantized(golden(f), group_size=0, bits=8)), r"group_size 0 does not divide"),
    "group size that mlx has not": (model(lambda f: quantized(golden(f), group_size=16, bits=8)),
                                    r"config\.json: quantization is not one of mlx's: .*16"),
    "bits that mlx has not": (model(lambda f: quantized(golden(f), group_size=32, bits=7)),
                              r"config\.json: quantization is not one of mlx's: .*7"),
    "bits missing": (model(lambda f: quantized(golden(f), group_size=32)), r"expected group_size, bits and mode"),
    "mode that mlx has not": (model(lambda f: quantized(golden(f), group_size=32, bits=8, mode="fp3")), r"fp3"),
    "other bits than stored": (model(lambda f: quantized(golden(f), group_size=32, bits=4)),
                               r"up_proj\.weight has shape \(64, 16\); expected \(64, 8\), by config\.json"),
    "another tool's quantization": (
        model(lambda f: with_config(golden(f), top={"quantization_config": {"quant_method": "awq"}})),
        r"config\.json: quant_method 'awq' is not supported; use a checkpoint in mlx's own quantization"),
    # Pairs
    "drafter of a target with other kv heads": (model(lambda f: golden(f, "dense", drafter="mixture")),
                                                r"X-assistant does not fit the target .*X: its .*kv heads is .*; use"),
    "drafter of another width": (model(lambda f: narrower_drafter(golden(f))),
                                 r"backbone_hidden_size is 32, the target's 64; use the -assistant checkpoint"),
    "drafter with another window": (model(lambda f: with_config(golden(f).with_name("X-assistant"), sliding_window=8)
                                          .with_name("X")), r"its sliding window is 8, the target's 16"),
    "drafter with another rotary base": (
        model(lambda f: with_config(golden(f).with_name("X-assistant"), rope_parameters={
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e4}})
            .with_name("X")), r"its rotary embedding is .*, the target's"),
    "drafter with another vocabulary": (model(lambda f: smaller_vocabulary(golden(f))),
                                        r"its vocabulary is 128, the target's 256"),
    "target as drafter": (lambda f: ["--model", str(golden(f)), "--draft-model", str(f / "X"), "-p", "Hello"],
                          r"X/config\.json: model_type 'gemma4' is not an MTP drafter; expected one of gemma4_"),
    "no such drafter": (lambda f: ["--model", str(golden(f)), "--draft-model", str(f / "no"), "-p", "Hello"],
                        r"no folder .*/no, .* check the path"),
    "empty model name": (flags("--model", ""), r"the model's name is empty: expected a folder or a Hub name"),
    "empty drafter name": (flags("--draft-model", " "), r"the draft model's name is empty: expected a folder or a Hub"),
    "damaged drafter": (model(lambda f: truncated(golden(f).with_name("X-assistant"), 0.5).with_name("X")),
                        r"X-assistant/model\.safetensors is truncated"),
    # Requests
    "empty prompt": (flags("-p", ""), r"the prompt is empty: expected some text"),
    "blank prompt": (flags("-p", " \n\t"), r"the prompt is empty: expected some text"),
    "one of two prompts empty": (flags("-p", "Hello", "-p", ""), r"the prompt is empty"),
    "prompt beyond the context": (flags("-p", "word " * 5000), r"the prompt has \d+ tokens; the model's context holds "
                                                              r"4096, the answer included: shorten the prompt"),
    "prompt beyond the asked context": (
        flags("-p", "word " * 40, "--max-context", "32"),
        r"max_context \(--max-context\) was set to 32, the answer included: shorten the prompt or raise that limit"),
    "prompt beyond the asked context and the model's": (flags("-p", "word " * 5000, "--max-context", "32"),
                                                        r"the model's context holds 4096, .*: shorten the prompt$"),
    "stdin twice": (flags("-p", "-", "-p", "-"), r"stdin can be read only once: give the others as text"),
    "bytes that are not UTF-8": (flags("-p", "Caf\udce9"), r"holds '\\udce9', which is no character .* to UTF-8"),
    "a system prompt that is not UTF-8": (flags("-p", "Hello", "--system-prompt", "\udcff"), r"holds '\\udcff', which"),
    "one of two prompts too long": (flags("-p", "Hello", "-p", "word " * 5000), r"the prompt has \d+ tokens"),
    "K = -1": (flags("--num-draft-tokens", "-1"), r"num_draft_tokens is -1; expected a whole number between 0 and 7"),
    "K = 8": (flags("--num-draft-tokens", "8"), r"num_draft_tokens is 8; expected a whole number between 0 and 7"),
    "K = two": (flags("--num-draft-tokens", "two"), r"--num-draft-tokens: 'two'; expected a whole number or auto; see"),
    "temperature below zero": (flags("--temp", "-0.1"), r"temperature is -0\.1; expected a finite number of at"),
    "temperature NaN": (flags("--temp", "nan"), r"temperature is nan"),
    "temperature infinite": (flags("--temp", "inf"), r"temperature is inf"),
    "top-p zero": (flags("--top-p", "0"), r"top_p is 0\.0; expected a number above 0 and at most 1"),
    "top-p above one": (flags("--top-p", "1.1"), r"top_p is 1\.1"),
    "top-k below zero": (flags("--top-k", "-1"), r"top_k is -1; expected a whole number of at least 0"),
    "min-p above one": (flags("--min-p", "1.5"), r"min_p is 1\.5; expected a number between 0 and 1"),
    "seed below zero": (flags("--seed", "-1"), r"seed is -1; expected a whole number between 0 and 4294967295"),
    "seed too large": (flags("--seed", str(2**32)), r"seed is 4294967296"),
    "no tokens wanted": (flags("--max-tokens", "0"), r"max_tokens is 0; expected a whole number of at least 1"),
    "draft bits": (flags("--draft-bits", "7"), r"draft_bits is 7; expected one of 2, 3, 4, 5, 6, 8"),
    "context of nothing": (flags("--max-context", "0"), r"max_context is 0; expected at least 2"),
    "unknown flag": (flags("--tempo", "1"), r"unrecognized arguments: --tempo 1; see --help"),
}


def assert_one_line(stdout: str, stderr: str, pattern: str) -> None:
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, stderr
    assert re.search(pattern, stderr), stderr


@pytest.mark.parametrize("case", TABLE)
def test_what_a_user_can_mend_is_told_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, pattern = TABLE[case]
    given = arguments(tmp_path)
    try:
        code = main(given)
    except SystemExit as exit_:  # argparse's way
        code = int(str(exit_.code))
    assert_one_line(*capsys.readouterr(), pattern)
    assert code == 2


@pytest.mark.parametrize("case", [
    "no folder", "truncated weights", "missing tensor", "wrong shape", "drafter with another window",
    "tokenizer missing", "prompt beyond the context", "one of two prompts too long", "draft bits",
])
def test_no_weight_is_read_before_such_an_error(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "materialize", lambda *_: pytest.fail("weights were read"))
    assert main(TABLE[case][0](tmp_path)) == 2


@pytest.mark.parametrize("case", ["truncated weights", "K = two", "prompt beyond the context", "tokenizer damaged"])
def test_the_command_itself_ends_with_that_line_and_code_2(case: str, tmp_path: Path) -> None:
    """In a process of its own, where libraries' warnings and log lines would show."""
    arguments, pattern = TABLE[case]
    assert_command_fails(arguments(tmp_path), pattern, os.environ.copy())


def test_a_hub_name_without_network_says_so(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    assert_command_fails(["--model", "someone/some-model", "-p", "Hello"],
                         r"someone/some-model .* not in the Hub's cache, .* check the network", environment)


def assert_command_fails(arguments: list[str], pattern: str, environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-m", "mlx_mtp.generate", *arguments], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=60, check=False)
    assert_one_line(done.stdout, done.stderr, pattern)
    assert done.returncode == 2
