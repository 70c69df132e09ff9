"""A GPU kernel for experts in decoding: each touched expert's weights are read and decoded once for up to 8 rows.

MLX's own gathered products read an expert again for every route where rows are single, or run unfilled rows of a tile
where they are not. Here a simdgroup of 32 lanes takes one tile (rows of one expert) and a few of the matrix' outputs:
lanes read neighbouring words of the weights, decode them to float32 and use them for every row of the tile that is
filled. A tile is found by the place of its first route among the routes sorted by expert: simdgroups at other places
return at once, so nothing but the sorting has to be done beforehand.

The body is written for Metal in what C++ has too. CUDA runs the same text: a warp is a simdgroup, and a few lines give
it Metal's names. A test compiles the body as C++, runs it lane by lane and counts its reads; on a device it is compared
with the portable path before it is ever used (see `expert_calibration`).

Rounding: weights are decoded as scale * q + bias in float32, rows are widened to float32, and sums are float32. They
are rounded to the rows' dtype twice: the hidden row after gelu(gate) * up, and the output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_mtp.device import is_gpu

TILE_ROWS = 8  # the body keeps so many sums of each output in registers
BLOCK = 8  # inputs a lane takes at a time
LANES = 32
OUTPUTS = 2  # of a simdgroup, over all matrices: more would reread rows less often, but take registers
SIMDGROUPS = 4  # of a threadgroup; they share nothing but the cache


class PackedMatrix(NamedTuple):
    """Experts' matrices as 32-bit words: [E, out, in * bits / 32] uint32.

    bits 4 and 8 are affine with scales and biases [E, out, in / group_size]; 16 is bfloat16 and 32 float32 as they are,
    whose scales and biases are not read.
    """

    words: mx.array
    scales: mx.array
    biases: mx.array
    bits: int
    group_size: int

    @property
    def format(self) -> tuple[int, ...]:
        """What the kernel is compiled for."""
        return self.bits, self.group_size, self.outputs, self.inputs

    @property
    def outputs(self) -> int:
        return self.words.shape[1]

    @property
    def inputs(self) -> int:
        return self.words.shape[2] * 32 // self.bits


def pack(weight: mx.array) -> PackedMatrix | None:
    """A plain matrix [E, out, in] for the kernel, without a copy; None if it has another dtype or an odd width."""
    if weight.dtype not in (mx.bfloat16, mx.float32) or weight.shape[-1] % BLOCK:
        return None
    words = weight.view(mx.uint32)
    return PackedMatrix(words, words, words, 8 * weight.itemsize, weight.shape[-1])


def pack_quantized(
    words: mx.array, scales: mx.array, biases: mx.array | None, bits: int, group_size: int
) -> PackedMatrix | None:
    """A quantized matrix for the kernel; None if it is of a kind that the kernel cannot decode."""
    if biases is None or bits not in (4, 8):
        return None
    return PackedMatrix(words, scales, biases, bits, group_size)


def is_available() -> bool:
    """Whether there is a device that the kernel can run on: a Mac's GPU or one that MLX uses CUDA on."""
    return is_gpu() and (mx.metal.is_available() or mx.cuda.is_available())


DECODE = """
                const auto MATRIX_words = read_several<BITS / 4>(MATRIX, row * (IN * BITS / 32) + column * BITS / 32);
                float MATRIX_scale = 1, MATRIX_bias = 0;
                if (BITS < 16) {
                    MATRIX_scale = float(MATRIX_scales[row * (IN / GROUP) + column / GROUP]);
                    MATRIX_bias = float(MATRIX_biases[row * (IN / GROUP) + column / GROUP]);
                }
                UNROLL
                for (int w = 0; w < BITS / 4; ++w) {
                    const uint32_t word = MATRIX_words.values[w];
                    UNROLL
                    for (int i = 0; i < 32 / BITS; ++i) {
                        const uint32_t bits = word >> (i * BITS);
                        float value;
                        if (BITS == 32) value = as_type<float>(bits);
                        else if (BITS == 16) value = as_type<float>(bits << 16);
                        else value = MATRIX_scale * float(bits & ((1u << (BITS % 32)) - 1)) + MATRIX_bias;
                        MATRIX_block[o][w * (32 / BITS) + i] = value;
                    }
                }
"""

BODY = """
    const int lane = thread_index_in_simdgroup;
    const int place = thread_position_in_grid.z;
    const int first_out = thread_position_in_grid.y * OUTS;
    const uint32_t expert = experts[place];
    int start = place;
    while (start >= 8 && experts[start - 8] == expert) start -= 8;
    while (start > 0 && experts[start - 1] == expert) --start;
    if ((place - start) % 8 != 0) return;
    const int rest = threads_per_grid.z - place;
    int rows = 1;
    while (rows < 8 && rows < rest && experts[place + rows] == expert) ++rows;
    int route[8], source[8];
    UNROLL
    for (int r = 0; r < 8; ++r) {
        route[r] = r < rows ? int(order[place + r]) : 0;
        source[r] = route[r] / ROUTES_PER_ROW;
    }
    DECLARE_SUMS
    for (int column = lane * 8; column < IN; column += 32 * 8) {
        DECLARE_BLOCKS
        UNROLL
        for (int o = 0; o < OUTS; ++o) {
            if (first_out + o < OUT) {
                const size_t row = size_t(expert) * OUT + first_out + o;
                DECODE_BLOCKS
            }
        }
        UNROLL
        for (int r = 0; r < 8; ++r) {
            if (r < rows) {
                const auto inputs = read_several<8>(x, size_t(source[r]) * IN + column);
                UNROLL
                for (int o = 0; o < OUTS; ++o) {
                    UNROLL
                    for (int i = 0; i < 8; ++i) {
                        ADD_PRODUCTS
                    }
                }
            }
        }
    }
    UNROLL
    for (int r = 0; r < 8; ++r) {
        UNROLL
        for (int o = 0; o < OUTS; ++o) {
            if (r < rows && first_out + o < OUT) {
                FINISH
                if (lane == r) out[size_t(route[r]) * OUT + first_out + o] = T(value);
            }
        }
    }
"""

PRODUCT = "const float value = simd_sum(weight_sums[o][r]);"
GATED = """
            const float gate_sum = simd_sum(gate_sums[o][r]), up_sum = simd_sum(up_sums[o][r]);
            const float z = 0.7978845608f * (gate_sum + 0.044715f * gate_sum * gate_sum * gate_sum);
            const float value = gate_sum * up_sum / (1 + metal::exp(-2 * z));
"""


def source(matrices: tuple[str, ...], finish: str) -> str:
    """The kernel's body for these matrices, which read the same rows; `finish` makes `value` of their sums."""

    def each(text: str) -> str:
        return "".join(text.replace("MATRIX", name) for name in matrices)

    body = BODY.replace("DECLARE_SUMS", each("float MATRIX_sums[OUTS][8] = {};"))
    body = body.replace("DECLARE_BLOCKS", each("float MATRIX_block[OUTS][8] = {};"))
    body = body.replace("DECODE_BLOCKS", each(DECODE))
    body = body.replace("ADD_PRODUCTS", each("MATRIX_sums[o][r] += MATRIX_block[o][i] * float(inputs.values[i]);"))
    return body.replace("FINISH", finish).replace("OUTS", str(OUTPUTS // len(matrices)))


MATRICES = {"product": ("weight",), "gate_up": ("gate", "up")}
SOURCES = {"product": source(MATRICES["product"], PRODUCT), "gate_up": source(MATRICES["gate_up"], GATED)}

# Arrays stay in registers only if loops over them are unrolled. Neighbours are read in one or two wide reads, which a
# compiler does not make of single ones, not knowing that they are aligned; here widths are multiples of BLOCK.
READ_SEVERAL = """
template <int N, typename T> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Several { T values[N]; };
template <int N, typename T> FUNCTION Several<N, T> read_several(const MEMORY T* from, size_t index) {
    return *(const MEMORY Several<N, T>*)(from + index);
}
"""
METAL_HEADER = """
#define UNROLL _Pragma("clang loop unroll(full)")
#define FUNCTION inline
#define MEMORY device
""" + READ_SEVERAL
CUDA_HEADER = """
#define UNROLL _Pragma("unroll")
#define FUNCTION __device__ inline
#define MEMORY
namespace metal { FUNCTION float exp(float x) { return ::expf(x); } }
template <typename To> FUNCTION To as_type(unsigned bits) { return __uint_as_float(bits); }
FUNCTION float simd_sum(float value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffff, value, step);
    return value;
}
""" + READ_SEVERAL
CUDA_PLACE = """
    const uint3 thread_position_in_grid = {threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, blockIdx.z};
    const uint3 threads_per_grid = {blockDim.x, gridDim.y * blockDim.y, gridDim.z};
    const unsigned thread_index_in_simdgroup = threadIdx.x;
"""


def input_names(kind: str) -> list[str]:
    """The kernel's inputs in order: rows, the parts of each matrix, sorted routes."""
    return ["x", *(name + part for name in MATRICES[kind] for part in ("", "_scales", "_biases")), "order", "experts"]


@cache
def _built(kind: str) -> Callable[..., Any]:
    name, inputs, outputs = f"mlx_mtp_expert_{kind}", input_names(kind), ["out"]
    kernel: Any
    if mx.cuda.is_available():
        kernel = mx.fast.cuda_kernel(name, inputs, outputs, source=CUDA_PLACE + SOURCES[kind], header=CUDA_HEADER)
    else:
        kernel = mx.fast.metal_kernel(name, inputs, outputs, source=SOURCES[kind], header=METAL_HEADER)
    return kernel


def _run(
    kind: str, x: mx.array, matrices: tuple[PackedMatrix, ...], order: mx.array, experts: mx.array
) -> mx.array:
    packed, routes = matrices[0], order.size
    assert {matrix.format for matrix in matrices} == {packed.format}
    blocks = -(-packed.outputs // (OUTPUTS // len(matrices)))
    operands = [array for matrix in matrices for array in (matrix.words, matrix.scales, matrix.biases)]
    return _built(kind)(
        inputs=[x, *operands, order, experts],
        template=[("T", x.dtype), ("IN", packed.inputs), ("OUT", packed.outputs), ("BITS", packed.bits),
                  ("GROUP", packed.group_size), ("ROUTES_PER_ROW", routes // x.shape[0])],
        grid=(LANES, blocks, routes),
        threadgroup=(LANES, min(SIMDGROUPS, blocks), 1),
        output_shapes=[(routes, packed.outputs)],
        output_dtypes=[x.dtype],
    )[0]


def gate_up_kernel(
    x: mx.array, gate: PackedMatrix, up: PackedMatrix, order: mx.array, experts: mx.array
) -> mx.array:
    """gelu(x gate) * (x up) for every route: x [N, in] -> [R, out]. order, experts: [R], as `product_kernel` has them.

    A row's routes are neighbours: route r belongs to row r // (R / N).
    """
    return _run("gate_up", x, (gate, up), order, experts)


def product_kernel(x: mx.array, weight: PackedMatrix, order: mx.array, experts: mx.array) -> mx.array:
    """x weight for every route: x [R, in] -> [R, out]. order: [R], routes sorted by expert; experts: [R], theirs."""
    return _run("product", x, (weight,), order, experts)
