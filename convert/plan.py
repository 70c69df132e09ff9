"""What will be done with every tensor of a checkpoint, known before a single number is read.

The model that config.json describes says which tensors there must be; `checkpoint.weights` says what each source tensor
is for; a recipe says what becomes of it. Each source tensor is used, dropped with a reason, or an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoint.loader import (
    QUANTIZABLE,
    assign,
    check_weights,
    parse_config,
    parse_quantization,
    read_json,
    shared_kv_layers,
    weight_files,
)
from mlx_mtp.checkpoint.weights import TOWERS, Part, tower_name, uses, written_name
from mlx_mtp.config import DRAFTER_MODEL_TYPES, DrafterConfig, QuantizationConfig, TargetConfig
from mlx_mtp.convert import jobs as job_of
from mlx_mtp.convert import recipes
from mlx_mtp.convert.jobs import PACKED, Job, written_dtype
from mlx_mtp.convert.safetensors import HalfTensor, Readable, StoredTensor, read_header
from mlx_mtp.convert.settings import ConvertConfig
from mlx_mtp.convert.shards import Shard, into_shards
from mlx_mtp.convert.written_config import TOWER_CONFIGS, written_config, written_quantization
from mlx_mtp.errors import CheckpointError, RequestError
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target

INDEX = "model.safetensors.index.json"

Headers = Mapping[Path, Mapping[str, Readable]]


@dataclass(frozen=True)
class Dropped:
    """A source tensor that is left out, and why."""

    name: str
    reason: str
    nbytes: int


@dataclass(frozen=True)
class PartPlan:
    """Everything about one folder that will be written; `config` is its config.json, `parsed` what that means."""

    part: Part
    source: Path
    config: dict[str, Any]
    parsed: TargetConfig | DrafterConfig
    jobs: tuple[Job, ...]
    shards: tuple[Shard, ...]
    dropped: tuple[Dropped, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def bytes_read(self) -> int:
        return sum(job.bytes_read for job in self.jobs)

    @property
    def index(self) -> dict[str, Any]:
        """The content of model.safetensors.index.json, as mlx-lm writes it."""
        weight_map = {output.name: shard.name for shard in self.shards for job in shard.jobs for output in job.outputs}
        totals = {"total_size": sum(job.nbytes for job in self.jobs),
                  "total_parameters": sum(job.parameters for job in self.jobs)}
        return {"metadata": totals, "weight_map": dict(sorted(weight_map.items()))}


def is_drafter(folder: Path) -> bool:
    """Whether a checkpoint is an assistant, by its config.json."""
    return read_json(folder / "config.json").get("model_type") in DRAFTER_MODEL_TYPES


def plan_part(folder: Path, part: Part, settings: ConvertConfig, is_companion: bool = False) -> PartPlan:
    """Plans one folder. `is_companion`: a drafter that came along with its target, not what was asked for by name.

    Raises CheckpointError for a file or a tensor that is not right, ConfigError for an unknown architecture and
    RequestError for settings that do not suit the source.
    """
    raw = read_json(folder / "config.json")
    config = _config(folder, part, raw)
    headers = read_headers(folder)
    weights = assign(headers.items(), part, config.text, _half)
    model = Target(config) if isinstance(config, TargetConfig) else Drafter(config)
    expected, arrays = check_weights(model, weights, raw, part, folder), weights.arrays
    is_packed = any(path.endswith(".scales") for path in arrays)
    asked, notes = _asked(folder, part, settings, is_packed, is_companion)
    modules = dict(model.named_modules())
    jobs = [job for path in expected if (job := _job(path, arrays, modules, config, asked, settings)) is not None]
    if part == "target" and settings.keep_towers:
        jobs += _tower_jobs(headers, raw, folder, settings.mlx_dtype)
    if isinstance(config, TargetConfig) and asked is not None:
        notes += recipes.warnings(config, asked)
    written = written_config(raw, config, settings.dtype, settings.keep_towers)
    written |= written_quantization([(job.module, job.quantization, job.parameters) for job in jobs
                                     if job.quantization is not None and job.is_quantized], asked)
    dropped = _dropped(headers, part, config, settings.keep_towers)
    return PartPlan(part, folder, written, config, tuple(jobs), into_shards(jobs), dropped, tuple(notes))


def read_headers(folder: Path) -> Headers:
    """The headers of a checkpoint's files. Raises CheckpointError for two tensors of one name and for a lying index."""
    headers: dict[Path, dict[str, Readable]] = {}
    seen: dict[str, Path] = {}
    for file in weight_files(folder):
        headers[file] = {tensor.name: tensor for tensor in read_header(file)}
        for name in headers[file]:
            if name in seen:
                raise CheckpointError(f"{file}: tensor {name} is there twice (also in {seen[name]}): delete the file "
                                      "that does not belong here")
            seen[name] = file
    index = folder / INDEX
    if index.exists():
        for name, file_name in read_json(index)["weight_map"].items():
            if seen.get(name) != folder / file_name:
                raise CheckpointError(f"{index} says that tensor {name} is in {file_name}, where it is not: download "
                                      "both again")
    return headers


def _config(folder: Path, part: Part, raw: Mapping[str, Any]) -> TargetConfig | DrafterConfig:
    if part == "target":
        return parse_config(folder, TargetConfig.from_json, raw)
    return parse_config(folder, DrafterConfig.from_json, raw)


def _half(tensor: Readable, half: int) -> Readable:
    assert isinstance(tensor, StoredTensor)
    return HalfTensor(tensor, half)


def _asked(
    folder: Path, part: Part, settings: ConvertConfig, is_packed: bool, is_companion: bool
) -> tuple[QuantizationConfig | None, list[str]]:
    """What the part's modules are to be quantized to, None for not at all; and what there is to say about it."""
    asked = settings.target_quantization if part == "target" else settings.drafter_quantization
    if part == "drafter" and not is_companion and settings.quantize and settings.draft_bits is None:
        asked = recipes.asked_of_drafter(settings.q_bits, settings.q_group_size, settings.q_mode)
    if settings.dequantize and not is_packed and not is_companion:
        raise RequestError(f"{folder} is not quantized; expected a checkpoint in mlx's own quantization to dequantize")
    if asked is None or not is_packed:
        return asked, []
    if is_companion and settings.draft_bits is None:
        return None, [f"the drafter {folder} is quantized already: it stays as it is"]
    raise RequestError(f"{folder} is quantized already, and quantizing it again would add to the error: convert the "
                       "bfloat16 checkpoint, or leave out " + ("--draft-bits" if is_companion else "-q"))


def _job(
    path: str, arrays: Mapping[str, Readable], modules: Mapping[str, nn.Module],
    config: TargetConfig | DrafterConfig, asked: QuantizationConfig | None, settings: ConvertConfig,
) -> Job | None:
    """What is done with the tensor `path`; None for scales and biases, which go with their weight."""
    part: Part = "target" if isinstance(config, TargetConfig) else "drafter"
    module_path, _, leaf = path.rpartition(".")
    source, module = arrays[path], modules[module_path]
    name, module_class = written_name(module_path, part), recipes.tensor_class(path, part)
    dtype = written_dtype(source.dtype, settings.mlx_dtype)
    if f"{module_path}.scales" in arrays and leaf in PACKED:
        if leaf != "weight":
            return None
        packed = [arrays[f"{module_path}.{leaf}"] for leaf in PACKED if f"{module_path}.{leaf}" in arrays]
        stored = QuantizationConfig(module.group_size, module.bits, module.mode)
        if settings.dequantize:
            return job_of.dequantized(name, packed, module_class, _full_dtype(packed, arrays, settings), stored)
        return job_of.copied_packed(name, packed, module_class, settings.mlx_dtype, stored)
    choice = recipes.Choice(None)
    if asked is not None and leaf == "weight" and isinstance(module, QUANTIZABLE):
        if isinstance(config, TargetConfig):
            rules = recipes.RULES[settings.recipe][recipes.family(config)]
            choice = recipes.choose(module_path, source.columns, asked, rules)
        else:
            choice = recipes.choose_for_drafter(module_path, source.columns, asked, config.centroids is not None)
    if choice.quantization is not None:
        return job_of.quantized(name, source, module_class, dtype, choice.quantization, choice.reason)
    is_ids = not mx.issubdtype(source.dtype, mx.floating)
    return job_of.copied(written_name(path, part), source, module_class, mx.int32 if is_ids else dtype, choice.reason)


def _full_dtype(packed: list[Readable], arrays: Mapping[str, Readable], settings: ConvertConfig) -> mx.Dtype:
    """The type of a dequantized weight: the one asked for, its scales', or the one that most tensors here have."""
    if settings.mlx_dtype is not None:
        return settings.mlx_dtype
    if mx.issubdtype(packed[1].dtype, mx.floating):
        return packed[1].dtype
    return Counter(array.dtype for array in arrays.values()
                   if mx.issubdtype(array.dtype, mx.floating)).most_common(1)[0][0]


def _tower_jobs(headers: Headers, raw: Mapping[str, Any], folder: Path, dtype: mx.Dtype | None) -> list[Job]:
    """Vision and audio tensors are copied; what is quantized among them is written in full, for its settings are not
    those of the text."""
    towers: dict[str, Readable] = {}
    for file, tensors in headers.items():
        for source_name, tensor in tensors.items():
            name = tower_name(source_name)
            if name in towers:
                raise CheckpointError(f"{file}: tensor {source_name} is there twice, also under another name: delete "
                                      "the one that does not belong here")
            if name is not None:
                towers[name] = tensor
    if not towers and (promised := [key for key in TOWER_CONFIGS if raw.get(key) is not None]):
        raise RequestError(f"{folder / 'config.json'} has {promised[0]}, but there are no vision or audio tensors to "
                           "keep: leave out --keep-towers")
    quantization: Mapping[str, Any] = raw.get("quantization") or {}
    overrides = {tower_name(path) or path: value for path, value in quantization.items()}
    jobs = []
    for name, tensor in towers.items():
        module, _, leaf = name.rpartition(".")
        scales = towers.get(f"{module}.scales")
        if scales is None or leaf not in PACKED:
            jobs.append(job_of.tower(name, tensor, recipes.VISION_AND_AUDIO, written_dtype(tensor.dtype, dtype)))
        elif leaf == "weight":
            packed = [towers[f"{module}.{leaf}"] for leaf in PACKED if f"{module}.{leaf}" in towers]
            stored = parse_quantization(overrides.get(module) or quantization,
                                        f"{folder / 'config.json'}: quantization of {module}")
            full = written_dtype(scales.dtype, dtype) if mx.issubdtype(scales.dtype, mx.floating) else mx.bfloat16
            jobs.append(job_of.dequantized(module, packed, recipes.VISION_AND_AUDIO, full, stored))
        elif f"{module}.weight" not in towers:
            raise CheckpointError(f"{tensor.file}: tensor {tensor.name} is there without its weight: download it again")
    return jobs


def _dropped(
    headers: Headers, part: Part, config: TargetConfig | DrafterConfig, keep_towers: bool
) -> tuple[Dropped, ...]:
    shared = shared_kv_layers(config.text) if part == "target" else frozenset()
    return tuple(
        Dropped(name, reason, tensor.nbytes)
        for tensors in headers.values() for name, tensor in tensors.items()
        if isinstance(reason := uses(name, part, shared), str) and not (keep_towers and reason in TOWERS)
    )
