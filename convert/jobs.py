"""What is done with one module or tensor: which rows are read, what they become, which tensors they are written as."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

from mlx_mtp.config import QuantizationConfig
from mlx_mtp.convert.safetensors import Readable, TensorInfo, as_array
from mlx_mtp.convert.towers import CLIP_BOUND, to_mlx_layout
from mlx_mtp.errors import CheckpointError

Action = Literal["copy", "quantize", "dequantize", "tower"]
PACKED = ("weight", "scales", "biases")  # the tensors of a quantized module, biases in affine mode only
NAN_SCALES = {"mxfp4": (0xFF,), "mxfp8": (0xFF,), "nvfp4": (0x7F, 0xFF)}  # bytes that stand for NaN among scales


@dataclass(frozen=True)
class Job:
    """One module or tensor on its way.

    sources, outputs: one tensor each, or weight, scales and biases of a quantized module, whose rows belong together.
    dtype: of the floating-point numbers that are written, and of those that are quantized. parameters: numbers in the
    model. quantization: what the module is quantized to, or was until now; reason: why it is not what was asked for.
    """

    module_class: str
    action: Action
    sources: tuple[Readable, ...]
    outputs: tuple[TensorInfo, ...]
    dtype: mx.Dtype
    parameters: int
    quantization: QuantizationConfig | None = None
    reason: str | None = None

    @property
    def module(self) -> str:
        """The module's name in config.json."""
        return self.outputs[0].name.removesuffix(".weight")

    @property
    def is_quantized(self) -> bool:
        return self.quantization is not None and self.action != "dequantize"

    @property
    def is_plain_copy(self) -> bool:
        """Whether bytes are written as they are read."""
        types = [(source.dtype, output.dtype) for source, output in zip(self.sources, self.outputs, strict=False)]
        return self.action == "copy" and all(source == output for source, output in types)

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all sources together."""
        return sum(source.columns * source.dtype.size for source in self.sources)

    @property
    def bytes_read(self) -> int:
        return sum(source.nbytes for source in self.sources)

    def run(self, rows: Sequence[np.ndarray]) -> list[mx.array]:
        """The outputs' rows, still lazy, from the sources' rows as `read_raw` gives them.

        Nothing depends on where the rows were cut: a group never crosses a row. Only a tower's tensor must be whole.
        """
        arrays = [as_array(raw, source.dtype) for raw, source in zip(rows, self.sources, strict=True)]
        if self.action == "tower":
            whole = arrays[0].reshape(self.sources[0].shape)
            arrays = [to_mlx_layout(self.sources[0].name, whole)]
        elif self.action == "dequantize":
            settings = self.quantization
            assert settings is not None
            # mlx computes in the scales' type, whatever comes out: if it is to be a wider one, theirs must be.
            arrays = [array.astype(written_dtype(array.dtype, self.dtype)) for array in arrays]
            biases = arrays[2] if len(arrays) == len(PACKED) else None
            arrays = [mx.dequantize(arrays[0], arrays[1], biases, settings.group_size, settings.bits, settings.mode,
                                    dtype=self.dtype)]
        elif self.action == "quantize":
            assert self.quantization is not None
            return list(mx.quantize(arrays[0].astype(self.dtype), *astuple(self.quantization)))
        return [array.astype(output.dtype) for array, output in zip(arrays, self.outputs, strict=True)]

    def check_finite(self, rows: Sequence[np.ndarray]) -> None:
        """Raises CheckpointError if there is NaN or infinity in the rows read, or if `dtype` is too narrow for them.

        Infinite clip bounds of a tower are what they should be: they do not clip.
        """
        for raw, source in zip(rows, self.sources, strict=True):
            if self.quantization is not None and source.dtype == mx.uint8:
                if np.isin(raw, NAN_SCALES[self.quantization.mode]).any():
                    raise _not_finite(source)
                continue
            if not mx.issubdtype(source.dtype, mx.floating) or CLIP_BOUND.search(source.name):
                continue
            largest = largest_bits(raw)
            if largest >= bits_of(math.inf, source.dtype):
                raise _not_finite(source)
            is_narrow = self.dtype == mx.float16 and source.dtype != mx.float16
            if is_narrow and largest > bits_of(65504, source.dtype):
                raise CheckpointError(f"{source.file}: tensor {source.name} holds numbers beyond 65504, the largest "
                                      "float16: use --dtype bfloat16")


    def check_dequantized(self, outputs: Sequence[mx.array]) -> None:
        """Raises CheckpointError if the products of finite scales are too large for `dtype`."""
        if self.action == "dequantize" and not mx.isfinite(outputs[0]).all().item():
            name = str(self.dtype).removeprefix("mlx.core.")
            raise CheckpointError(f"{self.sources[0].file}: tensor {self.sources[0].name} holds numbers beyond the "
                                  f"largest {name} once it is dequantized: use --dtype float32")


def _not_finite(source: Readable) -> CheckpointError:
    return CheckpointError(f"{source.file}: tensor {source.name} holds NaN or infinity: the checkpoint is damaged, "
                           "download it again (--allow-nan lets such numbers through)")


def largest_bits(raw: np.ndarray) -> int:
    """The largest bit pattern without its sign: of floating-point numbers, that is their largest absolute value."""
    if not raw.size:
        return 0
    sign = 1 << (8 * raw.itemsize - 1)
    positive = int(raw.view(f"i{raw.itemsize}").max())  # negative numbers are below all others
    negative = int(raw.max()) - sign  # and above all others here, if there are any
    return max(positive, negative, 0)


def bits_of(value: float, dtype: mx.Dtype) -> int:
    """A number's bit pattern in a floating-point type."""
    return int(np.asarray(mx.array(value, dtype).view({2: mx.uint16, 4: mx.uint32}[dtype.size])))


def written_dtype(stored: mx.Dtype, wanted: mx.Dtype | None) -> mx.Dtype:
    """`wanted` for floating-point numbers, if there is one; other numbers, packed ones too, stay as they are."""
    return wanted if wanted is not None and mx.issubdtype(stored, mx.floating) else stored


def copied(name: str, source: Readable, module_class: str, dtype: mx.Dtype, reason: str | None) -> Job:
    """A tensor that keeps its numbers, written as `dtype`; `reason`: why, if it could have been quantized."""
    return Job(module_class, "copy", (source,), (TensorInfo(name, dtype, source.shape),), dtype,
               math.prod(source.shape), None, reason)


def quantized(
    name: str, source: Readable, module_class: str, dtype: mx.Dtype, settings: QuantizationConfig, reason: str | None
) -> Job:
    """A module whose weight is quantized; `name` is the module's, as written."""
    lazy = mx.quantize(mx.zeros(source.shape, dtype), *astuple(settings))
    outputs = tuple(TensorInfo(f"{name}.{leaf}", array.dtype, array.shape)
                    for leaf, array in zip(PACKED, lazy, strict=False))
    return Job(module_class, "quantize", (source,), outputs, dtype, math.prod(source.shape), settings, reason)


def copied_packed(
    name: str, sources: Sequence[Readable], module_class: str, dtype: mx.Dtype | None, settings: QuantizationConfig
) -> Job:
    """A quantized module that stays as it is; `dtype` is for affine scales and biases."""
    outputs = tuple(TensorInfo(f"{name}.{leaf}", written_dtype(source.dtype, dtype), source.shape)
                    for leaf, source in zip(PACKED, sources, strict=False))
    return Job(module_class, "copy", tuple(sources), outputs, outputs[-1].dtype,
               math.prod(sources[0].shape) * 32 // settings.bits, settings)


def dequantized(
    name: str, sources: Sequence[Readable], module_class: str, dtype: mx.Dtype, settings: QuantizationConfig
) -> Job:
    """A quantized module whose weight is written in full."""
    *outer, packed = sources[0].shape
    shape = (*outer, packed * 32 // settings.bits)
    return Job(module_class, "dequantize", tuple(sources), (TensorInfo(f"{name}.weight", dtype, shape),), dtype,
               math.prod(shape), settings)


def tower(name: str, source: Readable, module_class: str, dtype: mx.Dtype) -> Job:
    """A tensor of a vision or audio tower, laid out as MLX has it."""
    shape = to_mlx_layout(source.name, mx.zeros(source.shape, dtype)).shape
    return Job(module_class, "tower", (source,), (TensorInfo(name, dtype, shape),), dtype, math.prod(shape))
