"""A folder -> a model. Strict both ways: what is missing, unexpected or misshapen is an error that names it.

Everything is checked from the files' headers before a weight is read: names, shapes, and whether the device can hold
them. Weights are then read lazily, file by file.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_mtp.checkpoint.weights import Part, strip_prefix, uses, written_name
from mlx_mtp.config import DrafterConfig, QuantizationConfig, TargetConfig, TextConfig
from mlx_mtp.errors import CheckpointError, ConfigError, PairError
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors under our names, lazily loaded, and how many were left out for which reason."""

    arrays: dict[str, mx.array]
    files: dict[str, Path]
    left_out: Counter[str]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def default_dtype() -> mx.Dtype | None:
    """float32 on CPU, where MLX's bfloat16 is several times slower; None, the checkpoint's own, on a GPU."""
    return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises CheckpointError if the file is missing or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} has no {path.name}: expected a checkpoint folder") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def shared_kv_layers(config: TextConfig) -> frozenset[int]:
    return frozenset(i for i, layer in enumerate(config.layers) if layer.kv_source != i)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or all there are."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index} names the file {name!r}; expected a plain file name")
            if not (folder / name).is_file():
                raise CheckpointError(f"{index} names {name}, which is not there: the download is incomplete")
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise CheckpointError(f"{folder} has no *.safetensors files (pickled weights are not read)")
    return [folder / name for name in names]


def open_weights(folder: Path, part: Part, config: TextConfig) -> Weights:
    """Reads the headers of a checkpoint's files and maps their tensors to our names; no weight is read yet.

    Raises CheckpointError for a truncated or malformed file, and for two tensors of one name.
    """
    weights = Weights({}, {}, Counter())
    shared = shared_kv_layers(config) if part == "target" else frozenset()
    for file in weight_files(folder):
        try:
            tensors = mx.load(str(file))
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{file} is truncated or not a safetensors file: download it again "
                                  f"({str(error).removeprefix('[load_safetensors] ')})") from error
        assert isinstance(tensors, dict)
        for name, array in tensors.items():
            targets = uses(name, part, shared)
            if isinstance(targets, str):
                weights.left_out[targets] += 1
                continue
            for use in targets:
                if use.path in weights.arrays:
                    raise CheckpointError(f"{file}: tensor {name} is there twice (also in {weights.files[use.path]})")
                if use.half is not None and (array.ndim < 2 or array.shape[-2] % 2):
                    raise CheckpointError(f"{file}: tensor {name} has shape {array.shape}; expected an even number "
                                          "of rows, gate above up")
                weights.arrays[use.path] = array if use.half is None else mx.split(array, 2, axis=-2)[use.half]
                weights.files[use.path] = file
    return weights


def load_target(folder: Path, dtype: mx.Dtype | None = None) -> tuple[Target, Counter[str]]:
    """Builds the target of a checkpoint folder, its weights still lazy; also how many tensors were left out, and why.

    dtype: of the floating-point weights; None keeps the checkpoint's.
    """
    raw = read_json(folder / "config.json")
    config = _parse(folder, TargetConfig.from_json, raw)
    weights = open_weights(folder, "target", config.text)
    model = Target(config)
    _fill(model, weights, raw, "target", folder, dtype)
    return model, weights.left_out


def load_drafter(folder: Path, dtype: mx.Dtype | None = None, bits: int | None = None) -> Drafter:
    """Builds the drafter of a checkpoint folder, its weights still lazy, quantized to `bits` if asked and not yet."""
    raw = read_json(folder / "config.json")
    config = _parse(folder, DrafterConfig.from_json, raw)
    weights = open_weights(folder, "drafter", config.text)
    model = Drafter(config)
    _fill(model, weights, raw, "drafter", folder, dtype)
    if bits is not None:
        quantize_drafter(model, bits)
    return model


def quantize_drafter(model: Drafter, bits: int) -> None:
    """Quantizes a drafter's layers and embedding (affine, the largest group that fits); centroids stay as they are."""
    if bits not in (2, 3, 4, 5, 6, 8):
        raise ConfigError(f"draft_bits is {bits}; expected 2, 3, 4, 5, 6 or 8")

    def settings(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not isinstance(module, nn.Linear | nn.Embedding) or path.startswith("masked_embedding"):
            return False
        width = module.weight.shape[-1]
        group = next((size for size in (64, 32) if width % size == 0), None)
        return False if group is None else {"group_size": group, "bits": bits}

    nn.quantize(model, class_predicate=settings)


def check_pair(target: TargetConfig, drafter: DrafterConfig) -> None:
    """Raises PairError, saying what differs, unless the drafter was made for such a target."""
    def expect(what: str, got: object, expected: object) -> None:
        if got != expected:
            raise PairError(f"the drafter does not fit the target: its {what} is {got}, the target's {expected}; "
                            "use the -assistant checkpoint of the same model")

    expect("backbone_hidden_size", drafter.backbone_hidden_size, target.text.hidden_size)
    expect("vocabulary", drafter.text.vocab_size, target.text.vocab_size)
    donors = {kind: target.text.layers[i] for kind, i in target.text.donors.items()}
    for i, layer in enumerate(drafter.text.layers):
        if layer.kind not in donors:
            raise PairError(f"the drafter does not fit the target: its layer {i} reads {layer.kind} keys, "
                            "of which the target has none")
        donor = donors[layer.kind]
        expect(f"{layer.kind} head size", layer.head_dim, donor.head_dim)
        expect(f"{layer.kind} kv heads", layer.num_kv_heads, donor.num_kv_heads)
    expect("sliding window", drafter.text.window, target.text.window)
    expect("rotary embedding", drafter.text.rotary, {kind: target.text.rotary[kind] for kind in drafter.text.rotary})


def materialize(model: nn.Module, name: str) -> None:
    """Reads all weights of a model now. Raises CheckpointError naming a tensor that holds NaN or infinity."""
    parameters = dict(tree_flatten(model.parameters()))
    mx.eval(parameters)
    floating = {path: array for path, array in parameters.items() if mx.issubdtype(array.dtype, mx.floating)}
    # A sum needs no memory of its own; only a suspect is looked at number by number.
    sums = np.array(mx.stack([array.sum().astype(mx.float32) for array in floating.values()]))
    for path, is_fine in zip(floating, np.isfinite(sums), strict=True):
        if not is_fine and not mx.isfinite(floating[path]).all().item():
            raise CheckpointError(f"{name}: weight {path} holds NaN or infinity; the checkpoint is damaged")


def _parse(folder: Path, parser: Any, raw: Mapping[str, Any]) -> Any:
    try:
        return parser(raw)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error


def _fill(
    model: nn.Module, weights: Weights, raw: Mapping[str, Any], part: Part, folder: Path, dtype: mx.Dtype | None
) -> None:
    """Quantizes the modules that are quantized on disk, checks every tensor, and hands the arrays to the model."""
    _quantize_as_stored(model, weights, raw, part, folder)
    expected = dict(tree_flatten(model.parameters()))
    for path in expected:
        if path not in weights.arrays:
            raise CheckpointError(f"{folder}: tensor {written_name(path, part)} is missing")
    for path, array in weights.arrays.items():
        where = f"{weights.files[path]}: tensor {written_name(path, part)}"
        if path not in expected:
            raise CheckpointError(f"{where} is not part of this model (config.json says so); refusing to ignore it")
        if array.shape != expected[path].shape:
            raise CheckpointError(f"{where} has shape {array.shape}; expected {expected[path].shape}")
    model.load_weights([(path, _cast(array, dtype)) for path, array in weights.arrays.items()], strict=True)
    model.eval()


def _cast(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    if array.dtype == mx.int64:
        return array.astype(mx.int32)  # token ids
    return array.astype(dtype) if dtype is not None and mx.issubdtype(array.dtype, mx.floating) else array


def _quantize_as_stored(
    model: nn.Module, weights: Weights, raw: Mapping[str, Any], part: Part, folder: Path
) -> None:
    """Makes those modules quantized whose `scales` are on disk, by config.json's `quantization` in mlx-lm's form."""
    quantization = raw.get("quantization")
    stored = {path.removesuffix(".scales") for path in weights.arrays if path.endswith(".scales")}
    if not stored:
        return
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"{folder}: tensor {written_name(min(stored), part)}.scales is there, but config.json "
                              "has no 'quantization'")
    overrides = {strip_prefix(path, part): value for path, value in quantization.items() if isinstance(value, Mapping)}

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path not in stored or not hasattr(module, "to_quantized"):
            return False
        chosen = _quantization(overrides.get(path, quantization), f"{folder / 'config.json'}: quantization of {path}")
        width = module.weight.shape[-1]
        if width % chosen.group_size:
            raise ConfigError(f"{folder / 'config.json'}: group_size {chosen.group_size} does not divide the "
                              f"{width} columns of {path}")
        return {"group_size": chosen.group_size, "bits": chosen.bits, "mode": chosen.mode}

    try:
        nn.quantize(model, class_predicate=settings)
    except ValueError as error:
        raise ConfigError(f"{folder / 'config.json'}: quantization: {error}") from error


def _quantization(raw: Mapping[str, Any], where: str) -> QuantizationConfig:
    try:
        return QuantizationConfig(int(raw["group_size"]), int(raw["bits"]), str(raw.get("mode", "affine")))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where} is {dict(raw)!r}; expected group_size, bits and mode") from error
