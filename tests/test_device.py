"""The device: limits asked of the one in use, models usable on another thread, one dtype all through."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support import GOLDENS, KINDS, decode, golden_pair, new_cache, relative_error

from mlx_mtp import ConfigError, device
from mlx_mtp.checkpoint.cpu_layout import CACHE_LINE, lay_out_for_cpu, on_cache_line
from mlx_mtp.checkpoint.loader import load_drafter, load_target, materialize
from mlx_mtp.config import SamplingParams
from mlx_mtp.models import vector_math
from mlx_mtp.models.moe import ExpertLinear
from mlx_mtp.spec_decode.loop import DecodeState, decode_round, first_token, prefill_chunk
from mlx_mtp.spec_decode.sampler import Sampler


def test_a_mac_told_to_use_its_cpu_is_not_asked_for_a_gpus_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """There Metal is available, but the default device knows no working set."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert device.memory_bytes() > 0
    with device.wired_memory():
        pass


def test_on_a_macs_gpu_memory_is_wired_up_to_its_working_set_and_released(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    monkeypatch.setattr(device, "is_gpu", lambda: True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 123})
    monkeypatch.setattr(mx, "set_wired_limit", lambda limit: limits.append(limit) or 7)
    with pytest.raises(KeyError), device.wired_memory():
        raise KeyError
    assert limits == [123, 7]


def test_a_mac_prepares_what_it_reads_on_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []
    done: list[tuple[str, bool]] = []

    @contextmanager
    def stream(place: Any) -> Iterator[None]:
        entered.append(place)
        yield
        entered.pop()

    def watch(name: str) -> None:
        function = getattr(mx, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            done.append((name, entered == [mx.cpu]))
            return function(*args, **kwargs)

        monkeypatch.setattr(mx, name, watched)

    monkeypatch.setattr(device, "is_metal", lambda: True)
    monkeypatch.setattr(mx, "stream", stream)
    for name in ("load", "split", "contiguous", "quantize"):
        watch(name)
    load_target(GOLDENS / "mixture" / "target")
    load_drafter(GOLDENS / "mixture" / "assistant", bits=4)
    assert set(done) == {("load", True), ("split", True), ("contiguous", True), ("quantize", True)}


def test_a_pair_loaded_on_one_thread_decodes_on_another() -> None:
    target, _ = load_target(GOLDENS / "edge" / "target", mx.float32)
    drafter = load_drafter(GOLDENS / "edge" / "assistant", mx.float32)
    materialize(target, "target", GOLDENS)
    materialize(drafter, "drafter", GOLDENS)
    outcome = SimpleNamespace(tokens=None)

    def work() -> None:
        mx.set_default_device(mx.cpu)
        outcome.tokens = decode(target, drafter, [[2, 5, 9]], [SamplingParams(8)], 3)[0].tokens

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert outcome.tokens == decode(target, None, [[2, 5, 9]], [SamplingParams(8)])[0].tokens


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mixture"])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_model_stays_in_its_dtype_from_embedding_to_logits(kind: str, dtype: mx.Dtype) -> None:
    """One float32 constant on the way would double the traffic of all that follows on a GPU."""
    target, _ = load_target(GOLDENS / kind / "target", dtype)
    drafter = load_drafter(GOLDENS / kind / "assistant", target.dtype)
    cache = new_cache(target)
    hidden = mx.zeros((1, 64), target.dtype)
    state = DecodeState(mx.zeros((1,), mx.int32), hidden, cache, Sampler.of([SamplingParams(temperature=1.0)]))
    state, _ = prefill_chunk(target, state, mx.array([[2, 7, 9, 30]]), mx.array([4]))
    state = first_token(target, state)
    token = target.embed(state.last_token)
    context = drafter.context({kind: cache.read(layer) for kind, layer in target.config.text.donors.items()},
                              {kind: cache.key_positions(kind) for kind in target.config.text.donors}, cache.lengths)
    candidates, projected = drafter(token, state.hidden, context)
    state, _ = decode_round(target, drafter, state, 2)
    target.suppress([3])
    logits = target.logits(state.hidden), target.choice_logits(state.hidden)
    floating = [token, candidates.logits, projected, state.hidden, *logits, *cache.arrays[1:]]
    assert {array.dtype for array in floating} == {dtype}


def test_a_stray_float32_tensor_takes_the_dtype_of_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "target"
    folder.mkdir()
    source = GOLDENS / "dense" / "target"
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = mx.load(str(source / "model.safetensors"))
    assert isinstance(weights, dict)
    name = next(name for name in weights if name.endswith("layers.3.layer_scalar"))
    mx.save_safetensors(str(folder / "model.safetensors"), weights | {name: weights[name].astype(mx.float32)})
    target, _ = load_target(folder, None)
    assert target.layers[3].layer_scalar.dtype == target.dtype == mx.bfloat16


def test_a_mixture_in_bfloat16_on_cpu_is_refused_at_load() -> None:
    with pytest.raises(ConfigError, match="float32"):
        load_target(GOLDENS / "mixture" / "target", mx.bfloat16)


def test_the_gpu_path_of_every_twin_gives_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """mx.fast's operations run on CPU too, as compositions: what a GPU would be given is the same function."""
    expected = {}
    for kind in ("edge", "dense"):
        target, drafter = golden_pair(kind)
        expected[kind] = decode(target, drafter, [[2, 5, 9] * 12, [2, 8]], [SamplingParams(30)] * 2, 3)
    monkeypatch.setattr(vector_math, "is_gpu", lambda: True)
    for kind, requests in expected.items():
        target, drafter = golden_pair(kind)
        again = decode(target, drafter, [[2, 5, 9] * 12, [2, 8]], [SamplingParams(30)] * 2, 3)
        assert [request.tokens for request in again] == [request.tokens for request in requests]


def test_matrices_lie_column_by_column_on_cpu_and_give_the_same_logits() -> None:
    """A layout, not a change: shapes, values and results stay."""
    folder = GOLDENS / "mixture" / "target"
    plain, _ = load_target(folder, mx.float32)
    laid_out, _ = load_target(folder, mx.float32)
    materialize(laid_out, "target", folder)
    before, after = plain.layers[0], laid_out.layers[0]
    assert mx.array_equal(after.mlp.down_proj.weight, before.mlp.down_proj.weight)
    assert np.asarray(after.mlp.down_proj.weight).strides == (4, 4 * after.mlp.down_proj.weight.shape[0])
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = after.experts.switch_glu[name].weight
        assert mx.array_equal(weight, before.experts.switch_glu[name].weight)
        _, rows, columns = weight.shape
        assert np.asarray(weight).strides == (4 * rows * columns, 4, 4 * rows)
    tokens, valid = mx.array([[2, 5, 9, 200]]), mx.array([4])
    logits = [model.logits(model(tokens, new_cache(model).stage(4, valid))) for model in (plain, laid_out)]
    assert relative_error(*logits) <= 2e-6


@pytest.mark.parametrize(("outputs", "inputs", "by_rows"), [
    (256, 512, True), (512, 256, False), (128, 512, False), (256, 1024, True), (1024, 1024, False), (512, 2048, False),
])
def test_experts_with_long_rows_lie_row_by_row_on_cpu(outputs: int, inputs: int, by_rows: bool) -> None:
    layer = ExpertLinear(3, inputs, outputs)
    before = mx.array(layer.weight)
    lay_out_for_cpu(layer)
    assert layer.weight.shape == (3, outputs, inputs)
    assert mx.array_equal(layer.weight, before)
    weight = np.asarray(layer.weight)
    assert weight.strides[1:] == ((4 * inputs, 4) if by_rows else (4, 4 * outputs))
    assert weight.ctypes.data % CACHE_LINE == 0


@pytest.mark.parametrize("shape", [(3,), (5, 7), (4, 32, 64), (2, 600, 512)])
def test_a_copy_on_a_cache_line_holds_the_same_numbers(shape: tuple[int, ...]) -> None:
    array = mx.random.normal(shape)
    for given in (array, array.swapaxes(0, -1)):
        copy = on_cache_line(given)
        assert mx.array_equal(copy, given)
        assert np.asarray(copy).flags.c_contiguous
        assert np.asarray(copy).ctypes.data % CACHE_LINE == 0


@pytest.mark.parametrize(("heads_per_kv_head", "widest"), [(1, 8), (4, 8), (8, 4), (32, 1), (64, 1)])
def test_metals_attention_kernel_takes_so_many_positions_of_a_row(
    heads_per_kv_head: int, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert device.widest_block(heads_per_kv_head) is None  # on a CPU there is no such cliff
    monkeypatch.setattr(device, "is_gpu", lambda: True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert device.widest_block(heads_per_kv_head) == widest
