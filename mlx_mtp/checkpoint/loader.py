"""A folder -> a model. Strict both ways: what is missing, unexpected or misshapen is an error that names it.

Everything is checked from the files' headers before a weight is read: names, shapes, and whether the device can hold
them. Weights are then read lazily, file by file.
"""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_mtp.checkpoint.cpu_layout import lay_out_for_cpu
from mlx_mtp.checkpoint.weights import TIED, Part, strip_prefix, uses, written_name
from mlx_mtp.config import DrafterConfig, QuantizationConfig, TargetConfig, TextConfig
from mlx_mtp.device import is_gpu, reading
from mlx_mtp.errors import CheckpointError, ConfigError, PairError, RequestError
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.moe import ExpertLinear, SwitchGLU
from mlx_mtp.models.target import Target

DRAFT_BITS = (2, 3, 4, 5, 6, 8)
TOKEN_ORDERING = "masked_embedding.token_ordering"

C = TypeVar("C", TargetConfig, DrafterConfig)

QUANTIZABLE = (nn.Linear, nn.Embedding, ExpertLinear)


class Described(Protocol):
    """What is known of a tensor before it is read; an mx.array is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> mx.Dtype: ...


A = TypeVar("A", bound=Described)


@dataclass(frozen=True)
class Weights(Generic[A]):
    """A checkpoint's tensors under our names, not read yet, and how many were left out for which reason."""

    arrays: dict[str, A]
    files: dict[str, Path]
    left_out: Counter[str]


def default_dtype() -> mx.Dtype | None:
    """float32 on CPU, where MLX's bfloat16 is several times slower; None, the checkpoint's own, on a GPU."""
    return None if is_gpu() else mx.float32


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises CheckpointError if the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}: expected a checkpoint's folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object: download it again")
    return content


def shared_kv_layers(config: TextConfig) -> frozenset[int]:
    return frozenset(i for i, layer in enumerate(config.layers) if layer.kv_source != i)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or all there are."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} has no 'weight_map' of tensor names to file names: download it again")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index} names the file {name!r}; expected the name of a file beside it")
            if not (folder / name).is_file():
                there = sorted(path.name for path in folder.glob("*.safetensors"))
                raise CheckpointError(f"{index} names {name}, which is not there" + (
                    f", and of {there[0]} it knows nothing: delete {index.name}, which describes other files"
                    if there and not {*there} & {*names} else ": the download is incomplete, run it again"))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise CheckpointError(f"{folder} has no *.safetensors files (pickled weights are not read): "
                              "download them, or convert the checkpoint")
    return [folder / name for name in names]


def open_weights(folder: Path, part: Part, config: TextConfig) -> Weights[mx.array]:
    """Reads the headers of a checkpoint's files and maps their tensors to our names; no weight is read yet.

    Raises CheckpointError for a truncated or malformed file, and for two tensors of one name.
    """
    def opened() -> Iterator[tuple[Path, Mapping[str, mx.array]]]:
        for file in weight_files(folder):
            try:
                tensors = mx.load(str(file))
            except (RuntimeError, ValueError) as error:
                raise CheckpointError(f"{file} is truncated or not a safetensors file: download it again "
                                      f"({str(error).removeprefix('[load_safetensors] ')})") from error
            assert isinstance(tensors, dict)
            yield file, tensors

    return assign(opened(), part, config, lambda array, half: mx.split(array, 2, axis=-2)[half])


def assign(
    files: Iterable[tuple[Path, Mapping[str, A]]], part: Part, config: TextConfig, half_of: Callable[[A, int], A]
) -> Weights[A]:
    """Maps the tensors of a checkpoint's files to our names; `half_of` takes half 0 or 1 along axis -2.

    Raises CheckpointError for two tensors of one name, and for one that no use can be made of.
    """
    weights: Weights[A] = Weights({}, {}, Counter())
    shared = shared_kv_layers(config) if part == "target" else frozenset()
    for file, tensors in files:
        for name, tensor in tensors.items():
            if name.endswith(".global_scale"):
                raise CheckpointError(f"{file}: tensor {name} is there, but nvfp4 with global scales is not supported: "
                                      "convert without them")
            targets = uses(name, part, shared)
            if isinstance(targets, str):
                weights.left_out[targets] += 1
                continue
            for use in targets:
                if use.path in weights.arrays:
                    raise CheckpointError(f"{file}: tensor {name} is there twice (also in {weights.files[use.path]}): "
                                          "delete the file that does not belong here")
                if use.half is not None and (len(tensor.shape) < 2 or tensor.shape[-2] % 2):
                    raise CheckpointError(f"{file}: tensor {name} has shape {tensor.shape}; expected an even number "
                                          "of rows, gate above up")
                weights.arrays[use.path] = tensor if use.half is None else half_of(tensor, use.half)
                weights.files[use.path] = file
    return weights


def load_target(folder: Path, dtype: mx.Dtype | None = None) -> tuple[Target, Counter[str]]:
    """Builds the target of a checkpoint folder, its weights still lazy; also how many tensors were left out, and why.

    dtype: of the floating-point weights; None keeps the checkpoint's.
    """
    raw = read_json(folder / "config.json")
    config = parse_config(folder, TargetConfig.from_json, raw)
    if config.text.experts and dtype is not None and dtype != mx.float32 and not is_gpu():
        raise ConfigError(f"{folder}: a mixture of experts runs on CPU in float32 only (MLX's gather_mm); "
                          f"expected dtype float32, got {_name(dtype)}")
    model = Target(config)
    with reading():
        weights = open_weights(folder, "target", config.text)
        _fill(model, weights, raw, "target", folder, dtype)
    model.suppress(_suppressed_tokens(folder, config.text.vocab_size))
    return model, weights.left_out


def _suppressed_tokens(folder: Path, vocab_size: int) -> list[int]:
    """What generation_config.json says is never to be generated: `<image|>` and `<audio|>`, for the 12B."""
    path = folder / "generation_config.json"
    tokens = read_json(path).get("suppress_tokens") if path.is_file() else None
    if tokens is None:
        return []
    if not isinstance(tokens, list) or not all(type(each) is int and 0 <= each < vocab_size for each in tokens):
        raise CheckpointError(f"{path}: suppress_tokens is {reprlib.repr(tokens)}; expected token ids below "
                              f"{vocab_size}: copy the file from the original checkpoint")
    return tokens


def load_drafter(folder: Path, dtype: mx.Dtype | None = None, bits: int | None = None) -> Drafter:
    """Builds the drafter of a checkpoint folder, its weights still lazy, quantized to `bits` if asked and not yet."""
    raw = read_json(folder / "config.json")
    config = parse_config(folder, DrafterConfig.from_json, raw)
    model = Drafter(config)
    with reading():
        weights = open_weights(folder, "drafter", config.text)
        _fill(model, weights, raw, "drafter", folder, dtype)
        if bits is not None:
            quantize_drafter(model, bits)
    return model


def quantize_drafter(model: Drafter, bits: int) -> None:
    """Quantizes a drafter's layers and embedding (affine, the largest group that fits); centroids stay as they are."""
    def settings(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not isinstance(module, nn.Linear | nn.Embedding) or path.startswith("masked_embedding"):
            return False
        width = module.weight.shape[-1]
        group = next((size for size in (64, 32) if width % size == 0), None)
        return False if group is None else {"group_size": group, "bits": bits}

    nn.quantize(model, class_predicate=settings)


def check_pair(
    target: TargetConfig, drafter: DrafterConfig, target_name: str, drafter_name: str,
    without: str = "--draft-model none",
) -> None:
    """Raises PairError, saying what differs, unless the drafter was made for such a target.

    without: how one goes on with the target alone, for the message.
    """
    complaint = f"the drafter {drafter_name} does not fit the target {target_name}"
    advice = f"use the -assistant checkpoint of the same model, or none ({without})"

    def expect(what: str, got: object, expected: object) -> None:
        if got != expected:
            raise PairError(f"{complaint}: its {what} is {got}, the target's {expected}; {advice}")

    expect("backbone_hidden_size", drafter.backbone_hidden_size, target.text.hidden_size)
    expect("vocabulary", drafter.text.vocab_size, target.text.vocab_size)
    donors = {kind: target.text.layers[i] for kind, i in target.text.donors.items()}
    for i, layer in enumerate(drafter.text.layers):
        if layer.kind not in donors:
            raise PairError(f"{complaint}: its layer {i} reads {layer.kind} keys, and the target has none; {advice}")
        donor = donors[layer.kind]
        expect(f"{layer.kind} head size", layer.head_dim, donor.head_dim)
        expect(f"{layer.kind} kv heads", layer.num_kv_heads, donor.num_kv_heads)
    expect("sliding window", drafter.text.window, target.text.window)
    expect("rotary embedding", drafter.text.rotary, {kind: target.text.rotary[kind] for kind in drafter.text.rotary})


def check_draft_bits(bits: int | None) -> None:
    """Raises RequestError unless a drafter can be quantized to `bits`; None leaves it as it is."""
    if bits is not None and bits not in DRAFT_BITS:
        raise RequestError(f"draft_bits is {bits!r}; expected one of {', '.join(map(str, DRAFT_BITS))}")


def materialize(model: nn.Module, part: Part, folder: Path) -> None:
    """Reads all weights of a model now. Raises CheckpointError naming a tensor whose values cannot be right."""
    lay_out_for_cpu(model)
    for module in model.modules():
        if isinstance(module, SwitchGLU):  # one by one: where gate and up are halves, the whole is beside them so long
            mx.eval(module.parameters())
    parameters = dict(tree_flatten(model.parameters()))
    mx.eval(parameters)
    mx.clear_cache()
    floating = {path: array for path, array in parameters.items() if mx.issubdtype(array.dtype, mx.floating)}
    # A sum needs no memory of its own; only a suspect is looked at number by number.
    sums = np.array(mx.stack([array.sum().astype(mx.float32) for array in floating.values()]))
    for path, is_fine in zip(floating, np.isfinite(sums), strict=True):
        if not is_fine and not mx.isfinite(floating[path]).all().item():
            raise CheckpointError(f"{folder}: tensor {written_name(path, part)} holds NaN or infinity: the checkpoint "
                                  "is damaged, download or convert it again")
    ordering = parameters.get(TOKEN_ORDERING)
    if ordering is not None and (np.sort(np.array(ordering)) != np.arange(ordering.size)).any():
        raise CheckpointError(f"{folder}: tensor {TOKEN_ORDERING} does not hold every token id once: the checkpoint "
                              "is damaged, download or convert it again")


def parse_config(folder: Path, parser: Callable[[Mapping[str, Any]], C], raw: Mapping[str, Any]) -> C:
    """Parses the config of a folder. Raises ConfigError with the file's name."""
    try:
        return parser(raw)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error


def _fill(
    model: nn.Module, weights: Weights[mx.array], raw: Mapping[str, Any], part: Part, folder: Path,
    dtype: mx.Dtype | None
) -> None:
    """Quantizes the modules that are quantized on disk, checks every tensor, and hands the arrays to the model."""
    expected = check_weights(model, weights, raw, part, folder)
    dtype = dtype or _main_dtype(weights)
    # Halves of a fused tensor are views. MLX's CUDA products of sorted routes misread those, kernels would copy them.
    casted = [(path, mx.contiguous(_cast(array, expected[path].dtype, dtype)))
              for path, array in weights.arrays.items()]
    model.load_weights(casted, strict=True)
    model.eval()


def check_weights(
    model: nn.Module, weights: Weights[A], raw: Mapping[str, Any], part: Part, folder: Path
) -> dict[str, mx.array]:
    """Quantizes the modules that are quantized on disk and compares every tensor; the model's own, still lazy.

    Raises CheckpointError for a tensor that is missing, unexpected, misshapen or of an unusable type, and for a head
    that is not the embedding; ConfigError for a quantization that is not mlx's.
    """
    if part == "target" and raw.get("tie_word_embeddings") is False and weights.left_out[TIED]:
        raise CheckpointError(f"{folder} has a head of its own (lm_head, and tie_word_embeddings is false), which is "
                              "not supported: expected a checkpoint whose head is the embedding, as Gemma 4's is")
    _quantize_as_stored(model, weights.arrays.keys(), raw, part, folder)
    expected: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for path in expected:
        if path not in weights.arrays:
            raise CheckpointError(f"{folder}: tensor {written_name(path, part)} is missing: the download is "
                                  "incomplete, or config.json belongs to another checkpoint")
    for path, array in weights.arrays.items():
        where = f"{weights.files[path]}: tensor {written_name(path, part)}"
        if path not in expected:
            raise CheckpointError(f"{where} is not part of the model that config.json describes: check that both "
                                  "belong together")
        if array.shape != expected[path].shape:
            raise CheckpointError(f"{where} has shape {array.shape}; expected {expected[path].shape}, by config.json: "
                                  "check that both belong together")
        if not _is_usable(array.dtype, expected[path].dtype):
            raise CheckpointError(f"{where} holds {_name(array.dtype)}; expected {_name(expected[path].dtype)}: "
                                  "convert the checkpoint to bfloat16, or to mlx's own quantization")
    return expected


def _is_usable(stored: mx.Dtype, expected: mx.Dtype) -> bool:
    """Any floating type for weights, any integer for token ids (int32); packed numbers only as they are."""
    if mx.issubdtype(expected, mx.floating):
        return mx.issubdtype(stored, mx.floating)
    return mx.issubdtype(stored, mx.integer) if expected == mx.int32 else stored == expected


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _main_dtype(weights: Weights[mx.array]) -> mx.Dtype:
    """The floating type most tensors have. The others take it too: one float32 norm would widen all that follows."""
    found = Counter(array.dtype for array in weights.arrays.values() if mx.issubdtype(array.dtype, mx.floating))
    return found.most_common(1)[0][0]


def _cast(array: mx.array, expected: mx.Dtype, dtype: mx.Dtype) -> mx.array:
    if expected == mx.int32:
        return array.astype(mx.int32)  # token ids
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def _quantize_as_stored(
    model: nn.Module, paths: Set[str], raw: Mapping[str, Any], part: Part, folder: Path
) -> None:
    """Makes those modules quantized whose `scales` are on disk, by config.json's `quantization` in mlx-lm's form."""
    for key in ("quantization", "quantization_config"):
        if not isinstance(raw.get(key) or {}, Mapping):
            raise ConfigError(f"{folder / 'config.json'}: {key} is {raw[key]!r}; expected an object")
    quantization = raw.get("quantization")
    method = (raw.get("quantization_config") or {}).get("quant_method") if quantization is None else None
    if method is not None:
        raise ConfigError(f"{folder / 'config.json'}: quant_method {method!r} is not supported; use a checkpoint in "
                          "mlx's own quantization, or convert the bfloat16 one")
    stored = {path.removesuffix(".scales") for path in paths if path.endswith(".scales")}
    if not stored:
        return
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"{folder}: tensor {written_name(min(stored), part)}.scales is there, but config.json "
                              "has no 'quantization': use the config.json that was written with these weights")
    overrides = {strip_prefix(path, part): value for path, value in quantization.items() if isinstance(value, Mapping)}

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path not in stored or not isinstance(module, QUANTIZABLE):
            return False
        where = f"{folder / 'config.json'}: quantization of {path}"
        chosen = parse_quantization(overrides.get(path, quantization), where)
        width = module.weight.shape[-1]
        if chosen.group_size < 1 or width % chosen.group_size:
            raise ConfigError(f"{folder / 'config.json'}: group_size {chosen.group_size} does not divide the "
                              f"{width} columns of {path}")
        return {"group_size": chosen.group_size, "bits": chosen.bits, "mode": chosen.mode}

    try:
        nn.quantize(model, class_predicate=settings)
    except ValueError as error:
        raise ConfigError(f"{folder / 'config.json'}: quantization is not one of mlx's: {error}") from error


def parse_quantization(raw: Mapping[str, Any], where: str) -> QuantizationConfig:
    """One module's settings in mlx-lm's spelling; `where` is what a ConfigError calls them."""
    try:
        return QuantizationConfig(int(raw["group_size"]), int(raw["bits"]), str(raw.get("mode", "affine")))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where} is {dict(raw)!r}; expected group_size, bits and mode") from error
