"""The sweep on a pair with the shapes of a published one and random weights, made on the device: no file is read.

    python -m bench.real_shapes 26B-A4B --bits 4 --acceptance 0.6 0.8
    python -m bench.real_shapes 31B --rows 1 --context 0 4096
    python -m bench.real_shapes 26B-A4B --layers 6                      the first layers only, where memory is short

Shapes are bench.model_bytes', quantized by the converter's recipe. What random weights say is decided by the last bit
of near-ties, so the text is a script: after every token comes a settled one, whatever the logits are. All work of a
target and a drafter is done, and acceptance is replayed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from bench import blas, plots
from bench.card import environment_card, numbers
from bench.decode import add_sweep_flags, guarded, run, save, sweep_config, tell
from bench.model_bytes import BITS, DrafterModel, TargetModel, family_drafter, family_target
from bench.prompts import RANDOM
from bench.recipe_sizes import FAMILY
from bench.sweep import NoPeers
from mlx_mtp import Pair, demo
from mlx_mtp.check.command import check_output_folder
from mlx_mtp.check.loading import choose_fastest_dispatch
from mlx_mtp.checkpoint.loader import QUANTIZABLE, default_dtype
from mlx_mtp.command import Parser
from mlx_mtp.config import FULL, QuantizationConfig, TargetConfig
from mlx_mtp.convert import recipes
from mlx_mtp.errors import RequestError
from mlx_mtp.kv_cache import CacheStage
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from mlx_mtp.tokenizer import Tokenizer

Settings = Callable[[str, int], QuantizationConfig | None]  # a module's path and columns -> its quantization
CERTAIN = 1e4  # a logit above every other


class ScriptedTarget(Target):
    """A target whose text is a walk through the vocabulary: `successors[token]` is what follows a token.

    Beside a target's own work that is one look-up a token and one comparison a logit.
    """

    def __init__(self, config: TargetConfig, successors: np.ndarray) -> None:
        super().__init__(config)
        self._successors = mx.array(successors, mx.int32)
        self._following = mx.zeros((1, 1), mx.int32)

    def __call__(self, tokens: mx.array, stage: CacheStage, keep: mx.array | None = None) -> mx.array:
        following = self._successors[tokens]
        self._following = following if keep is None else mx.take_along_axis(following, keep[:, None], axis=1)
        return super().__call__(tokens, stage, keep)

    def logits(self, hidden: mx.array) -> mx.array:
        """Of the pass before: [B, L, D] -> [B, L, V], or of a prefill's last position, [B, D] -> [B, V]."""
        logits = super().logits(hidden)
        following = self._following if hidden.ndim == 3 else self._following[:, 0]
        is_next = mx.arange(logits.shape[-1], dtype=mx.int32) == following[..., None]
        return mx.where(is_next, mx.array(CERTAIN, logits.dtype), logits)

    def text_after(self, prompt: Sequence[int], count: int) -> list[int]:
        """The script's next `count` tokens."""
        successors, token, text = np.array(self._successors), prompt[-1], []
        for _ in range(count):
            token = int(successors[token])
            text.append(token)
        return text


def cycle(vocab_size: int, left_out: frozenset[int], seed: int) -> np.ndarray:
    """[V]: one walk through all tokens but those left out, which are entered from nowhere."""
    kept = np.array([token for token in range(vocab_size) if token not in left_out])
    order = np.random.default_rng(seed).permutation(kept)
    successors = np.full(vocab_size, order[0])
    successors[order] = np.roll(order, -1)
    return successors


def random_pair(
    target: TargetModel, drafter: DrafterModel, dtype: mx.Dtype, seed: int = 0
) -> Pair:
    """Builds both with weights drawn on the device, in `dtype` where they are not quantized.

    Peak memory is that of the result and of one matrix in float32 beside it.
    """
    mx.random.seed(seed)
    tokenizer = Tokenizer(demo.TARGET)
    successors = cycle(target.config.text.vocab_size, tokenizer.stop_tokens, seed)
    target_model, drafter_model = ScriptedTarget(target.config, successors), Drafter(drafter.config)

    def of_target(path: str, columns: int) -> QuantizationConfig | None:
        return None if target.settings is None else recipes.choose(
            path, columns, target.settings, target.rules).quantization

    def of_drafter(path: str, columns: int) -> QuantizationConfig | None:
        has_centroids = drafter.config.centroids is not None
        return None if drafter.settings is None else recipes.choose_for_drafter(
            path, columns, drafter.settings, has_centroids).quantization

    make(target_model, of_target, dtype)
    make(drafter_model, of_drafter, dtype)
    return Pair(target_model, drafter_model, tokenizer, target.config.text.max_context,
                ("random weights: the text is a script and means nothing",))


def make(model: nn.Module, settings: Settings, dtype: mx.Dtype) -> None:
    """Draws, casts and quantizes a model's weights, matrix by matrix: until then they are but a recipe."""
    def quantization(path: str, module: nn.Module) -> bool | dict[str, object]:
        chosen = settings(path, module.weight.shape[-1]) if isinstance(module, QUANTIZABLE) else None
        return False if chosen is None else {
            "group_size": chosen.group_size, "bits": chosen.bits, "mode": chosen.mode}

    model.set_dtype(dtype)
    nn.quantize(model, class_predicate=quantization)
    if isinstance(model, Drafter) and model.config.centroids is not None:
        model.masked_embedding.token_ordering = mx.arange(model.config.text.vocab_size, dtype=mx.int32)
    for _, module in model.named_modules():
        mx.eval([value for value in module.values() if isinstance(value, mx.array)])
        mx.clear_cache()
    model.eval()


def first_layers(target: TargetModel, count: int | None) -> TargetModel:
    """The target with fewer layers. Raises RequestError for a number that does not end with a full one."""
    text = target.config.text
    if count is None:
        return target
    ends = [i + 1 for i, layer in enumerate(text.layers) if layer.kind == FULL]
    if count not in ends:
        raise RequestError(f"layers is {count}; expected one of {', '.join(map(str, ends))}: the last layer is a full "
                           "one")
    config = replace(target.config, text=replace(text, layers=text.layers[:count]))
    return replace(target, config=config)


def family_name(name: str) -> str:
    """As the family spells it, whatever the case. Raises RequestError for another."""
    known = {one.lower(): one for one in FAMILY}
    if name.lower() not in known:
        raise RequestError(f"model is {name!r}; expected one of {', '.join(FAMILY)}")
    return known[name.lower()]


def shaped_pair(name: str, bits: int, draft_bits: int, layers: int | None = None, seed: int = 0) -> Pair:
    """A random pair of a family member's shapes. Raises RequestError for an unknown name or number of layers."""
    whole = family_target(family_name(name), bits)
    target, drafter = first_layers(whole, layers), family_drafter(whole, draft_bits)
    return random_pair(target, drafter, default_dtype() or mx.bfloat16, seed)


def parser() -> argparse.ArgumentParser:
    cli = Parser(prog="python -m bench.real_shapes", description=(__doc__ or "").splitlines()[0])
    cli.add_argument("model", help=f"one of {', '.join(FAMILY)}")
    cli.add_argument("--bits", type=int, choices=BITS, default=4, help="of the target (default: %(default)s)")
    cli.add_argument("--draft-bits", type=int, choices=BITS, default=4, help="default: %(default)s")
    cli.add_argument("--layers", type=int, help="only the first ones of the target (default: all)")
    cli.add_argument("--acceptance", type=float, nargs="+", default=[0.6, 0.8], metavar="A",
                     help="at each position, one sweep for each (default: 0.6 0.8)")
    cli.add_argument("--seed", type=int, default=0)
    add_sweep_flags(cli)
    cli.set_defaults(prompts=[RANDOM])
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    return guarded(lambda: _main(args))


def _main(args: argparse.Namespace) -> None:
    configs = [sweep_config(args, acceptance=acceptance) for acceptance in args.acceptance]
    if args.plots:
        plots.check_installed()
    name = family_name(args.model)
    folders = [args.output / f"acceptance-{config.acceptance:g}" for config in configs]
    for folder in folders:
        check_output_folder(folder)
    pair = shaped_pair(name, args.bits, args.draft_bits, args.layers, args.seed)
    if not args.no_calibration:
        choose_fastest_dispatch(pair)
    layers = f"{len(pair.target.config.text.layers)} of {len(family_target(name, args.bits).config.text.layers)} layers"
    card = environment_card() | {
        "target": f"the shapes of {name}, {layers}, random weights, seed {args.seed}",
        "target numbers": numbers(pair.target), "drafter numbers": numbers(pair.drafter)}
    for config, folder in zip(configs, folders, strict=True):
        save(run(pair, config, card, NoPeers(), tell), folder, args.plots)


if __name__ == "__main__":
    blas.prefer_openblas()
    sys.exit(main())
