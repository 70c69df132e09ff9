"""The converter on a checkpoint with the 26B's true shapes, against `cp` of its files and mx.quantize of its tensors.

    python -m bench.convert_speed FOLDER [--layers 3] [--rounds 2]

Writes about 2 GB a layer into FOLDER (6.5 GB by default), converts it to 4 bits in a process of its own, and deletes it
again. Speed is that of copying the files plus quantizing the tensors, each measured alone, whole tensors in memory,
over that of the converter, which does both; its peak resident memory includes the interpreter. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from bench.card import environment_card
from mlx_mtp.checkpoint.loader import weight_files
from mlx_mtp.convert.jobs import Job
from mlx_mtp.convert.plan import plan_part
from mlx_mtp.convert.safetensors import TensorInfo, encode_header
from mlx_mtp.convert.settings import ConvertConfig

BLOCK = 2**24  # random numbers made once and repeated: what they are does not change the work
HIDDEN, VOCABULARY, EXPERTS, EXPERT_WIDTH, MLP_WIDTH = 2816, 262_144, 128, 704, 2112
HEADS, SLIDING_HEAD, SLIDING_KV, FULL_HEAD, FULL_KV = 16, 256, 8, 512, 2


# Linux counts the memory of the process that starts another one as that one's: so a small one starts the converter.
LAUNCHER = """
import os, subprocess, sys, time
begun = time.perf_counter()
process = subprocess.Popen([sys.executable, "-m", "mlx_mtp.convert", *sys.argv[1:]], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(time.perf_counter() - begun, usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def config(layers: int) -> dict[str, object]:
    """config.json of the 26B with fewer layers, the last one full."""
    text = {
        "model_type": "gemma4_text", "hidden_size": HIDDEN, "num_hidden_layers": layers, "vocab_size": VOCABULARY,
        "num_attention_heads": HEADS, "num_key_value_heads": SLIDING_KV, "num_global_key_value_heads": FULL_KV,
        "head_dim": SLIDING_HEAD, "global_head_dim": FULL_HEAD, "attention_k_eq_v": True, "sliding_window": 1024,
        "intermediate_size": MLP_WIDTH, "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 8,
        "moe_intermediate_size": EXPERT_WIDTH, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention"] * (layers - 1) + ["full_attention"],
    }
    return {"model_type": "gemma4", "dtype": "bfloat16", "text_config": text}


def layer_shapes(is_full: bool) -> dict[str, tuple[int, ...]]:
    """A layer's tensors as Hugging Face names them."""
    head, kv = (FULL_HEAD, FULL_KV) if is_full else (SLIDING_HEAD, SLIDING_KV)
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (HEADS * head, HIDDEN), "self_attn.k_proj.weight": (kv * head, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HEADS * head), "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,), "layer_scalar": (1,), "router.proj.weight": (EXPERTS, HIDDEN),
        "router.scale": (HIDDEN,), "router.per_expert_scale": (EXPERTS,),
        "experts.gate_up_proj": (EXPERTS, 2 * EXPERT_WIDTH, HIDDEN),
        "experts.down_proj": (EXPERTS, HIDDEN, EXPERT_WIDTH), "mlp.down_proj.weight": (HIDDEN, MLP_WIDTH),
        "mlp.gate_proj.weight": (MLP_WIDTH, HIDDEN), "mlp.up_proj.weight": (MLP_WIDTH, HIDDEN),
    }
    if not is_full:  # full layers use their keys as values
        shapes["self_attn.v_proj.weight"] = (kv * head, HIDDEN)
    for norm in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                 "post_feedforward_layernorm", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_1",
                 "post_feedforward_layernorm_2"):
        shapes[f"{norm}.weight"] = (HIDDEN,)
    return shapes


def make_checkpoint(folder: Path, layers: int) -> int:
    """Writes the checkpoint, one file a layer and one for the embedding; returns its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(layers)))
    numbers = mx.random.normal((BLOCK,)) * 0.02
    block = np.asarray(numbers.astype(mx.bfloat16).view(mx.uint16)).tobytes()
    prefix = "model.language_model."
    files = [{f"{prefix}embed_tokens.weight": (VOCABULARY, HIDDEN), f"{prefix}norm.weight": (HIDDEN,)}]
    files += [{f"{prefix}layers.{i}.{name}": shape for name, shape in layer_shapes(i == layers - 1).items()}
              for i in range(layers)]
    total = 0
    for i, shapes in enumerate(files):
        header, _, size = encode_header([TensorInfo(name, mx.bfloat16, shape) for name, shape in shapes.items()], {})
        with (folder / f"model-{i + 1:05d}-of-{len(files):05d}.safetensors").open("wb") as file:
            file.write(header)
            for _ in range((size - len(header)) // len(block)):
                file.write(block)
            file.write(block[: (size - len(header)) % len(block)])
        total += size
    return total


def seconds_to_copy(source: Path, target: Path) -> float:
    begun = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    seconds = time.perf_counter() - begun
    shutil.rmtree(target)
    return seconds


def seconds_to_quantize(source: Path, jobs: tuple[Job, ...]) -> float:
    """mx.quantize of whole tensors that are in memory already, with the settings that the converter uses."""
    seconds = 0.0
    for job in jobs:
        if job.action == "quantize":
            assert job.quantization is not None
            weight = mx.contiguous(job.sources[0].read())
            mx.eval(weight)
            begun = time.perf_counter()
            settings = job.quantization
            mx.eval(mx.quantize(weight, settings.group_size, settings.bits, settings.mode))
            seconds += time.perf_counter() - begun
    mx.clear_cache()
    return seconds


def convert(source: Path, target: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of the converter in a process of its own."""
    arguments = ["--hf-path", str(source), "--mlx-path", str(target), "-q", "--no-draft", "--no-verify"]
    run = subprocess.run([sys.executable, "-c", LAUNCHER, *arguments], capture_output=True, text=True, check=True)
    shutil.rmtree(target)
    seconds, peak = run.stdout.split()
    return float(seconds), int(peak) * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("folder", type=Path, help="where to write, about twice the checkpoint's size")
    cli.add_argument("--layers", type=int, default=3)
    cli.add_argument("--rounds", type=int, default=2)
    args = cli.parse_args()
    print(json.dumps(environment_card()))
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        source = Path(work) / "source"
        size = make_checkpoint(source, args.layers)
        plan = plan_part(source, "target", ConvertConfig(str(source), quantize=True))
        largest = max(math.prod(tensor.shape) * 2 for job in plan.jobs for tensor in job.sources)
        print(f"{size / 1e9:.2f} GB in {len(weight_files(source))} files, largest tensor to quantize "
              f"{largest / 1e9:.2f} GB, {plan.nbytes / 1e9:.2f} GB afterwards")
        print("round  cp s  quantize s  convert s  speed  peak GB", flush=True)
        for i in range(args.rounds):
            copying = seconds_to_copy(source, Path(work) / "copy")
            quantizing = seconds_to_quantize(source, plan.jobs)
            converting, peak = convert(source, Path(work) / "converted")
            print(f"{i + 1:5d}  {copying:4.1f}  {quantizing:10.1f}  {converting:9.1f}  "
                  f"{(copying + quantizing) / converting:4.0%}  {peak / 1e9:7.2f}", flush=True)


if __name__ == "__main__":
    main()
