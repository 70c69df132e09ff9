"""Stands in for `mx.fast.metal_kernel` where there is no Metal: a kernel's body compiled as C++ (metal_emulation.h)."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_mtp.models.expert_kernel import METAL_HEADER

FAULTS = ("none", "an input is read outside its bounds", "an output is written outside its bounds",
          "lanes of one simdgroup diverge", "a wide read is not aligned",
          "no such number of bits")
LANES = 32
HEADER = Path(__file__).with_suffix(".h")
INTEGERS = ("IN", "OUT", "GROUP", "ROUTES_PER_ROW")  # template arguments besides T and BITS
BITS = (4, 8, 16, 32)
WORDS = ("weight", "gate", "up", "order", "experts")


class KernelError(Exception):
    """The kernel did what a device would answer with rubbish or a crash."""


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


def element(name: str) -> str:
    """The C++ type of an input's elements: words of matrices and routes are uint32, all else has the rows' type."""
    return "uint32_t" if name in WORDS else "T"


def program(input_names: Sequence[str], source: str) -> str:
    inputs = [f"Input<{element(name)}> {name}" for name in input_names]
    integers = ", ".join(f"int {name}" for name in INTEGERS)
    arguments = ", ".join(
        f"Input<{element(name)}>{{static_cast<const {element(name)}*>(arrays[{i}]), sizes[{i}], counts[{i}]}}"
        for i, name in enumerate(input_names)
    )
    last = len(input_names)
    numbers = ", ".join(f"integers[{i}]" for i in range(len(INTEGERS)))
    cases = " ".join(f"case {bits}: return run<T, {bits}>(arrays, sizes, counts, integers, y, z);" for bits in BITS)
    return f"""#include <cstddef>
#define device
{METAL_HEADER}
#include "{HEADER}"
template <typename T, int BITS> void kernel({', '.join(inputs)}, Output<T> out, {integers},
        uint3 thread_position_in_grid, uint3 threads_per_grid, uint thread_index_in_simdgroup) {{ {source} }}
template <typename T, int BITS> int run(void** arrays, size_t* sizes, uint32_t** counts, int* integers,
        uint y, uint z) {{
    return run_grid(y, z, [&](uint3 position, uint lane) {{
        kernel<T, BITS>({arguments}, Output<T>{{static_cast<T*>(arrays[{last}]), sizes[{last}], counts[{last}]}},
                        {numbers}, position, uint3{{32, y, z}}, lane);
    }});
}}
template <typename T> int run(void** arrays, size_t* sizes, uint32_t** counts, int* integers,
        int bits, uint y, uint z) {{
    switch (bits) {{ {cases} }}
    return UNKNOWN_BITS;
}}
extern "C" int run_float(void** a, size_t* s, uint32_t** c, int* i, int bits, uint y, uint z) {{
    return run<float>(a, s, c, i, bits, y, z);
}}
extern "C" int run_bfloat16(void** a, size_t* s, uint32_t** c, int* i, int bits, uint y, uint z) {{
    return run<bfloat16_t>(a, s, c, i, bits, y, z);
}}
"""


def as_numpy(array: mx.array) -> np.ndarray:
    """bfloat16 as the uint16 it is stored in."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)


class EmulatedKernel:
    """Called as what `mx.fast.metal_kernel` returns. reads: of the last call, for each input by its elements."""

    def __init__(self, input_names: Sequence[str], source: str, folder: Path, name: str) -> None:
        self.names, self.reads = tuple(input_names), dict[str, np.ndarray]()
        text, library = folder / f"{name}.cpp", folder / f"{name}.so"
        text.write_text(program(input_names, source))
        options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-w"]
        subprocess.run([compiler() or "", *options, str(text), "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))

    def __call__(
        self, *, inputs: Sequence[mx.array], template: Sequence[tuple[str, object]], grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int], output_shapes: Sequence[tuple[int, ...]], output_dtypes: Sequence[mx.Dtype],
    ) -> list[mx.array]:
        assert grid[0] == threadgroup[0] == LANES  # else a simdgroup would not be one row of the grid
        assert threadgroup[0] * threadgroup[1] * threadgroup[2] <= 1024
        values, dtype = dict(template), output_dtypes[0]
        y = -(-grid[1] // threadgroup[1]) * threadgroup[1]  # CUDA runs whole threadgroups
        arrays = [np.ascontiguousarray(as_numpy(array)) for array in inputs]
        for name, array in zip(self.names, arrays, strict=True):
            assert element(name) == "T" or array.dtype == np.uint32
        out = np.zeros(output_shapes[0], np.uint16 if dtype == mx.bfloat16 else np.float32)
        counts = [np.zeros(array.size, np.uint32) for array in (*arrays, out)]
        everything = [*arrays, out]

        def pointers(parts: Sequence[np.ndarray]) -> ctypes.Array[ctypes.c_void_p]:
            return (ctypes.c_void_p * len(parts))(*(part.ctypes.data for part in parts))

        sizes = (ctypes.c_size_t * len(everything))(*(array.size for array in everything))
        integers = (ctypes.c_int * len(INTEGERS))(*(values[name] for name in INTEGERS))
        run = self._library.run_bfloat16 if dtype == mx.bfloat16 else self._library.run_float
        if fault := run(pointers(everything), sizes, pointers(counts), integers, values["BITS"], y, grid[2]):
            raise KernelError(FAULTS[fault])
        if not (counts[-1] == 1).all():
            raise KernelError("an output is not written exactly once")
        self.reads = {name: count.reshape(array.shape)
                      for name, array, count in zip(self.names, arrays, counts, strict=False)}
        made = mx.array(out)
        return [made.view(mx.bfloat16) if dtype == mx.bfloat16 else made]
