"""How far each tensor moved, source against output, read row by row: neither checkpoint is ever held."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mtp.checkpoint.loader import (
    assign,
    check_weights,
    parse_config,
    parse_quantization,
    read_json,
    weight_files,
)
from mlx_mtp.checkpoint.weights import Part, strip_prefix, tower_name, written_name
from mlx_mtp.config import DrafterConfig, QuantizationConfig, TargetConfig
from mlx_mtp.convert.recipes import CLASSES, VISION_AND_AUDIO, tensor_class
from mlx_mtp.convert.report import ClassErrors
from mlx_mtp.convert.safetensors import HalfTensor, Readable, StoredTensor, as_array, read_header
from mlx_mtp.convert.towers import to_mlx_layout
from mlx_mtp.errors import CheckpointError
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target

CHUNK_NUMBERS = 2**20  # compared at a time: 4 MB in float32, a handful of such arrays; larger ones leave the caches

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Module:
    """The tensors of one module on disk, and its quantization if it has one. A tensor outside modules is one too."""

    weight: Readable
    scales: Readable | None = None
    biases: Readable | None = None
    quantization: QuantizationConfig | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights as numbers, unpacked."""
        shape = self.weight.shape
        if self.quantization is None:
            return shape
        return (*shape[:-1], shape[-1] * 8 * self.weight.dtype.size // self.quantization.bits)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.weight, self.scales, self.biases) if tensor is not None)

    @property
    def format(self) -> str:
        if self.quantization is None:
            return str(self.weight.dtype).removeprefix("mlx.core.")
        settings = self.quantization
        return f"{settings.mode} {settings.bits} bits, groups of {settings.group_size}"

    def read(self, start: int, stop: int) -> mx.array:
        """Rows start .. stop as float32, dequantized: [stop - start, columns]."""
        packed = read_rows(self.weight, start, stop)
        if self.quantization is None or self.scales is None:
            return packed.astype(mx.float32)
        biases = None if self.biases is None else read_rows(self.biases, start, stop).astype(mx.float32)
        scales = read_rows(self.scales, start, stop)
        scales = scales if scales.dtype == mx.uint8 else scales.astype(mx.float32)  # mx-formats keep exponents
        settings = self.quantization
        return mx.dequantize(packed, scales, biases, settings.group_size, settings.bits, mode=settings.mode,
                             dtype=mx.float32)


def stored_modules(folder: Path, part: Part) -> dict[str, Module]:
    """The modules of a checkpoint under their paths inside, from headers alone, checked as the loader does.

    Raises CheckpointError or ConfigError.
    """
    raw = read_json(folder / "config.json")
    model: Target | Drafter
    if part == "target":
        model = Target(parse_config(folder, TargetConfig.from_json, raw))
    else:
        model = Drafter(parse_config(folder, DrafterConfig.from_json, raw))
    headers: dict[Path, dict[str, Readable]] = {
        file: {tensor.name: tensor for tensor in read_header(file)} for file in weight_files(folder)
    }
    weights = assign(headers.items(), part, model.config.text, _half)
    check_weights(model, weights, raw, part, folder)
    quantized = dict(model.named_modules())
    modules = {}
    for path, tensor in weights.arrays.items():
        name = path.removesuffix(".weight")
        if path.endswith((".scales", ".biases")):
            continue
        if f"{name}.scales" not in weights.arrays:
            modules[name] = Module(tensor)
            continue
        settings = quantized[name]
        modules[name] = Module(
            tensor, weights.arrays[f"{name}.scales"], weights.arrays.get(f"{name}.biases"),
            QuantizationConfig(settings.group_size, settings.bits, settings.mode),
        )
    return modules


def read_rows(tensor: Readable, start: int, stop: int) -> mx.array:
    """Rows start .. stop of a tensor on disk, or of the half of one: [stop - start, columns]."""
    return as_array(tensor.read_raw(start, stop), tensor.dtype)


def _half(tensor: Readable, half: int) -> Readable:
    assert isinstance(tensor, StoredTensor)
    return HalfTensor(tensor, half)


def stored_towers(folder: Path) -> dict[str, Module]:
    """The vision and audio tensors of a checkpoint under the names they are written with. Raises CheckpointError."""
    raw = read_json(folder / "config.json")
    quantization = raw.get("quantization") or {}
    overrides = {tower_name(path) or path: value for path, value in quantization.items()}
    tensors = {name: tensor for file in weight_files(folder) for tensor in read_header(file)
               if (name := tower_name(tensor.name)) is not None}
    modules = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        scales = tensors.get(f"{module}.scales")
        if scales is None:
            modules[name] = Module(tensor)
        elif leaf == "weight":
            settings = parse_quantization(overrides.get(module) or quantization,
                                          f"{folder / 'config.json'}: quantization of {module}")
            modules[name] = Module(tensor, scales, tensors.get(f"{module}.biases"), settings)
    return modules


def class_errors(source: Path, output: Path, part: Part, progress: Progress) -> tuple[ClassErrors, ...]:
    """The errors of every module of one part, by class, in the order of recipes.CLASSES.

    progress("comparing weights", done, total) is told of bytes of the source. Raises CheckpointError if the two do not
    have the same modules of the same shapes.
    """
    before, after = ({written_name(path, part): module for path, module in stored_modules(folder, part).items()}
                     for folder in (source, output))
    _check_same(before, after, source, output)
    total, done = sum(module.nbytes for module in before.values()), 0
    errors: dict[str, float] = {}
    by_class: dict[str, dict[str, Module]] = {}
    for name, module in before.items():
        errors[name] = relative_error((module.read(*rows), after[name].read(*rows)) for rows in _chunks(module))
        by_class.setdefault(tensor_class(strip_prefix(name, part), part), {})[name] = after[name]
        done += module.nbytes
        progress("comparing weights", done, total)
    return tuple(_summary(part, kind, by_class[kind], errors) for kind in CLASSES if kind in by_class)


def tower_errors(source: Path, output: Path, progress: Progress) -> tuple[ClassErrors, ...]:
    """The same for vision and audio tensors, one class; none if the output left them out."""
    after = stored_towers(output)
    if not after:
        return ()
    before = stored_towers(source)
    _check_same(before, after, source, output, sorted)
    errors: dict[str, float] = {}
    for i, name in enumerate(before):
        # Whole, since a convolution's axes are in another order in the source; no such tensor is large.
        one, other = (to_mlx_layout(name, module.read(0, module.weight.rows).reshape(module.shape))
                      for module in (before[name], after[name]))
        columns = one.shape[-1] if one.ndim else 1
        errors[name] = relative_error([(one.reshape(-1, columns), other.reshape(-1, columns))])
        progress("comparing vision and audio", i + 1, len(before))
    return (_summary("target", VISION_AND_AUDIO, after, errors),)


def relative_error(pairs: Iterable[tuple[mx.array, mx.array]]) -> float:
    """|output - source| / |source| of a tensor that comes in pieces [..., columns] of (source, output).

    Equal numbers differ by 0, infinite ones too. Where the source is all zero: 0, or 1 if the output is not.
    """
    difference = length = 0.0
    for one, other in pairs:
        moved = mx.where(one == other, 0, other - one)
        sums = mx.stack([mx.square(moved).sum(axis=-1), mx.square(one).sum(axis=-1)])
        in_rows = np.array(sums).astype(np.float64)  # row sums are short; the long way is added up in float64
        difference += float(in_rows[0].sum())
        length += float(in_rows[1].sum())
    if difference == 0:
        return 0.0
    return math.sqrt(difference / length) if length else 1.0


def _check_same(
    before: Mapping[str, Module], after: Mapping[str, Module], source: Path, output: Path,
    axes: Callable[[tuple[int, ...]], Sequence[int]] = tuple,
) -> None:
    """Raises CheckpointError unless both have the same modules of the same shapes; `axes` may take away their order."""
    for missing, folder in ((before.keys() - after.keys(), output), (after.keys() - before.keys(), source)):
        if missing:
            raise CheckpointError(f"{folder}: tensor {min(missing)} is missing, the other checkpoint has it: convert "
                                  "again")
    for name, module in before.items():
        if axes(module.shape) != axes(after[name].shape):
            raise CheckpointError(f"{output}: {name} has the shape {after[name].shape}; expected {module.shape}, as in "
                                  "the source: convert again")


def _chunks(module: Module) -> Iterator[tuple[int, int]]:
    rows, columns = math.prod(module.shape[:-1]), module.shape[-1] if module.shape else 1
    step = max(1, CHUNK_NUMBERS // max(columns, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _summary(part: Part, kind: str, modules: Mapping[str, Module], errors: Mapping[str, float]) -> ClassErrors:
    formats: dict[str, int] = {}
    for module in modules.values():
        formats[module.format] = formats.get(module.format, 0) + 1
    # NaN compares with nothing: it counts as the worst there is.
    worst = max(modules, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return ClassErrors(
        part=part,
        name=kind,
        modules=len(modules),
        numbers=sum(math.prod(module.shape) for module in modules.values()),
        stored_bytes=sum(module.nbytes for module in modules.values()),
        formats=formats,
        mean_error=sum(errors[name] for name in modules) / len(modules),
        worst_error=errors[worst],
        worst=worst,
    )
