"""The GPU kernel, run as C++ lane by lane, equals a dense loop over experts and reads each expert once."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from metal_emulation import EmulatedKernel, KernelError, compiler

from mlx_mtp.config import ExpertsConfig
from mlx_mtp.models import expert_kernel
from mlx_mtp.models.expert_dispatch import KERNEL, dispatch
from mlx_mtp.models.expert_kernel import MATRICES, OUTPUTS, SOURCES, TILE_ROWS, input_names, pack, product_kernel
from mlx_mtp.models.moe import ExpertLinear, QuantizedExpertLinear, SwitchGLU

CASES = 216
Kernels = dict[str, EmulatedKernel]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    if compiler() is None:
        pytest.skip("no C++ compiler (g++ or clang++) to run the kernel with")
    folder = tmp_path_factory.mktemp("kernels")
    return {kind: EmulatedKernel(input_names(kind), source, folder, kind) for kind, source in SOURCES.items()}


@pytest.fixture
def kernels(compiled: Kernels, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """The emulated kernels, in place of those that MLX would build."""
    monkeypatch.setattr(expert_kernel, "_built", compiled.__getitem__)
    return compiled


def rounded(x: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    return np.array(mx.array(x.astype(np.float32)).astype(dtype).astype(mx.float32), np.float64)


def decoded(matrix: ExpertLinear | QuantizedExpertLinear) -> np.ndarray:
    """The weights as float32 numbers, as the kernel decodes them."""
    if isinstance(matrix, ExpertLinear):
        return np.array(matrix.weight.astype(mx.float32), np.float64)
    parts = (part.astype(mx.float32) for part in (matrix.scales, matrix.biases))
    wide = mx.dequantize(matrix.weight, *parts, group_size=matrix.group_size, bits=matrix.bits)
    return np.array(wide, np.float64)


def dense(glu: SwitchGLU, x: mx.array, chosen: np.ndarray) -> np.ndarray:
    """A loop over experts that rounds where the kernel rounds: the hidden row, and the output."""
    rows = np.array(x.astype(mx.float32), np.float64)
    out = np.zeros((*chosen.shape, rows.shape[1]))
    gate, up, down = (decoded(matrix) for matrix in (glu.gate_proj, glu.up_proj, glu.down_proj))
    for expert in range(gate.shape[0]):
        gates, ups = rows @ gate[expert].T, rows @ up[expert].T
        gelu = 0.5 * gates * (1 + np.tanh(np.sqrt(2 / np.pi) * (gates + 0.044715 * gates**3)))
        mine = chosen == expert
        result = rounded(rounded(gelu * ups, x.dtype) @ down[expert].T, x.dtype)
        out[mine] = result[np.nonzero(mine)[0]]
    return out


def random_layer(rng: np.random.Generator, case: int) -> tuple[SwitchGLU, ExpertsConfig, mx.Dtype, int]:
    """Every combination of dtype, format and group over 18 cases: sizes are not multiples of what a simdgroup takes."""
    dtype = (mx.float32, mx.bfloat16)[case % 2]
    bits, group = (0, 4, 8)[case // 2 % 3], (32, 64, 128)[case // 6 % 3]
    step = group if bits else 8
    hidden, width = (step * int(rng.integers(-(-40 // step), 544 // step + 1)) for _ in range(2))  # lanes take 256
    count = int(rng.integers(1, 9))
    settings = ExpertsConfig(count, int(rng.integers(1, min(count, 4) + 1)), width)
    mx.random.seed(case)
    glu = SwitchGLU(hidden, settings)
    glu.set_dtype(dtype)
    if bits:
        nn.quantize(glu, group_size=group, bits=bits)
    return glu, settings, dtype, hidden


def random_routing(rng: np.random.Generator, tokens: int, settings: ExpertsConfig) -> np.ndarray:
    """Uniform, skewed, or all on the same experts."""
    odds = rng.choice([1.0, 0.5, 1e-3]) ** np.arange(settings.num_experts) + 1e-9
    return np.stack([rng.choice(settings.num_experts, settings.top_k, replace=False, p=odds / odds.sum())
                     for _ in range(tokens)])


def assert_equals_a_dense_loop(rng: np.random.Generator, case: int) -> np.ndarray:
    """Returns the experts [N, top_k] of the case's tokens."""
    glu, settings, dtype, hidden = random_layer(rng, case)
    chosen = random_routing(rng, int(rng.integers(1, 11)), settings)
    x = mx.array(rng.normal(size=(len(chosen), hidden)), mx.float32).astype(dtype)
    got = dispatch(KERNEL, x, mx.array(chosen, mx.uint32), glu.mlp)
    assert got.dtype == dtype
    expected = dense(glu, x, chosen)
    error = np.linalg.norm(np.array(got.astype(mx.float32)) - expected) / np.linalg.norm(expected)
    assert error <= (1e-3 if dtype == mx.bfloat16 else 1e-5), f"case {case}"
    return chosen


def test_the_kernel_equals_a_dense_loop_over_experts_in_many_random_cases(kernels: Kernels) -> None:
    rng, fills = np.random.default_rng(0), set()
    for case in range(CASES):
        chosen = assert_equals_a_dense_loop(rng, case)
        for count in np.bincount(chosen.flatten()).tolist():
            fills |= {min(TILE_ROWS, count - first) for first in range(0, count, TILE_ROWS)}
    assert fills == set(range(1, TILE_ROWS + 1))  # tiles of every height were among them


@pytest.mark.skipif(not (mx.metal.is_available() or mx.cuda.is_available()), reason="no GPU")
@pytest.mark.parametrize("case", range(18))
def test_on_a_gpu_the_kernel_equals_a_dense_loop_too(case: int) -> None:
    mx.set_default_device(mx.gpu)
    try:
        assert_equals_a_dense_loop(np.random.default_rng(case), case)
    finally:
        mx.set_default_device(mx.cpu)


@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_each_distinct_expert_is_read_exactly_once(kernels: Kernels, rows: int, bits: int) -> None:
    # A round of K = 3 drafts: 4 positions a row, 8 of 128 experts each, uniform.
    settings, rng = ExpertsConfig(128, 8, 32), np.random.default_rng(rows)
    glu = SwitchGLU(32, settings)
    if bits:
        nn.quantize(glu, group_size=32, bits=bits)
    chosen = np.argsort(rng.random((rows * 4, 128)), axis=1)[:, :8]
    counts = np.bincount(chosen.flatten(), minlength=128)
    assert 2 <= counts.max() <= TILE_ROWS  # some are shared, and none needs a second tile
    mx.eval(dispatch(KERNEL, mx.ones((rows * 4, 32)), mx.array(chosen, mx.uint32), glu.mlp))
    for kind, matrices in MATRICES.items():
        for matrix in matrices:
            reads = kernels[kind].reads[matrix]
            assert (reads == (counts > 0)[:, None, None]).all()  # every word of a touched expert once, of others never


def test_an_expert_of_more_rows_than_a_tile_has_is_read_once_for_each_tile(kernels: Kernels) -> None:
    glu = SwitchGLU(32, ExpertsConfig(4, 1, 32))
    mx.eval(dispatch(KERNEL, mx.ones((17, 32)), mx.full((17, 1), 2, mx.uint32), glu.mlp))
    reads = kernels["product"].reads["weight"]
    assert (reads[2] == 3).all()
    assert (reads[[0, 1, 3]] == 0).all()


@pytest.mark.parametrize(("right", "wrong"), [
    ("if (r < rows) {", "if (r < rows - 1) {"),  # a tile's last row is left out of the sums
    ("if (r < rows && first_out + o < OUT)", "if (r <= rows && first_out + o < OUT)"),  # one row too many is written
    ("rows < rest && ", "rows <= rest && "),  # the last tile looks past the end
    ("start > 0 && experts[start - 1]", "start > 1 && experts[start - 1]"),  # the first run is cut in two
    ("% 8 != 0", "% 7 != 0"),  # tiles overlap
])
def test_an_off_by_one_in_the_tile_bounds_is_caught(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    assert right in SOURCES["product"]
    mutant = EmulatedKernel(input_names("product"), SOURCES["product"].replace(right, wrong), tmp_path, "mutant")
    monkeypatch.setattr(expert_kernel, "_built", {**kernels, "product": mutant}.__getitem__)
    glu = SwitchGLU(40, ExpertsConfig(3, 2, 40))
    chosen = np.array([[0, 1], [1, 2], [1, 0], [2, 0], [0, 1], *[[1, 2]] * 5])  # more than a tile of expert 1
    x = mx.random.normal((len(chosen), 40), key=mx.random.key(0))

    def is_right() -> bool:
        got = np.array(dispatch(KERNEL, x, mx.array(chosen, mx.uint32), glu.mlp))
        return bool(np.allclose(got, dense(glu, x, chosen), atol=1e-5))

    with suppress(KernelError):
        assert not is_right()
    monkeypatch.setattr(expert_kernel, "_built", kernels.__getitem__)
    assert is_right()  # and it was the mutation that was caught


def seven_outputs() -> tuple[mx.array, mx.array]:
    """Products whose outputs do not fill the last simdgroup, and what they should be."""
    weight, x = mx.random.normal((3, 7, 16), key=mx.random.key(0)), mx.random.normal((5, 16), key=mx.random.key(1))
    assert weight.shape[1] % OUTPUTS
    matrix, chosen = pack(weight), mx.array([2, 0, 2, 1, 2], mx.uint32)
    assert matrix is not None
    order = mx.argsort(chosen)
    return product_kernel(x, matrix, order, chosen[order]), (weight[chosen] @ x[..., None])[..., 0]


def test_outputs_need_not_fill_the_last_simdgroup(kernels: Kernels) -> None:
    got, expected = seven_outputs()
    assert np.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(("right", "wrong"), [
    ("if (first_out + o < OUT)", "if (first_out + o <= OUT)"),  # weights behind the last ones are read
    ("r < rows && first_out + o < OUT", "r < rows && first_out + o <= OUT"),  # an output too many is written
])
def test_an_off_by_one_in_the_outputs_is_caught(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    assert SOURCES["product"].count(right) == 1
    mutant = EmulatedKernel(input_names("product"), SOURCES["product"].replace(right, wrong), tmp_path, "mutant")
    monkeypatch.setattr(expert_kernel, "_built", {**kernels, "product": mutant}.__getitem__)
    with pytest.raises(KernelError):
        seven_outputs()


def test_formats_that_the_kernel_cannot_decode_are_declined() -> None:
    odd, half = ExpertLinear(2, 12, 8), ExpertLinear(2, 16, 8)
    half.set_dtype(mx.float16)
    assert odd.packed() is None
    assert half.packed() is None
    assert ExpertLinear(2, 64, 8).to_quantized(64, 3).packed() is None
    assert ExpertLinear(2, 64, 8).to_quantized(32, 4, "mxfp4").packed() is None
    packed = ExpertLinear(2, 64, 8).to_quantized(64, 4).packed()
    assert packed is not None
    assert (packed.inputs, packed.outputs) == (64, 8)
