"""Tensors of the vision and audio towers on their way into a folder that mlx-vlm loads.

They are copied, never quantized: mlx-vlm leaves towers alone too. Their names are Hugging Face's without the leading
`model.` (`mlx_mtp.checkpoint.weights.tower_name`). Most arrays stay as they are, the clip bounds of shape () too, whose
unset value is infinity; only the audio tower's convolutions are laid out differently, channels last.
mlx-vlm 0.7 guesses the layout from the shape, earlier ones trust the file's metadata {"format": "mlx"}: we write MLX's
layout and that metadata, which suits both.
"""

from __future__ import annotations

import re

import mlx.core as mx

CLIP_BOUND = re.compile(r"\.(input|output)_(min|max)$")  # of a clipped linear layer; infinite where it does not clip

CONV2D = re.compile(r"\.subsample_conv_projection\.layer\d+\.conv\.weight$")
CONV1D = re.compile(r"\.depthwise_conv1d\.weight$")


def to_mlx_layout(name: str, array: mx.array) -> mx.array:
    """A tower's tensor with channels last; arrays that already are, and all but convolutions, come back as they are.

    conv of the audio tower's input: [out, in, k, k] -> [out, k, k, in]; depthwise conv: [C, 1, k] -> [C, k, 1].
    """
    if CONV2D.search(name) and array.ndim == 4 and array.shape[1] != array.shape[2]:  # the kernel is square
        return array.transpose(0, 2, 3, 1)
    if CONV1D.search(name) and array.ndim == 3 and array.shape[2] != 1:
        return array.transpose(0, 2, 1)
    return array
