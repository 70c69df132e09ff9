"""What a user may ask the converter for, checked before anything is read."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, fields
from typing import Any

import mlx.core as mx

from mlx_mtp.config import QuantizationConfig
from mlx_mtp.convert.recipes import RECIPES, Recipe, asked, asked_of_drafter
from mlx_mtp.errors import RequestError

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
WITHOUT_EFFECT_ON_BYTES = ("hf_path", "mlx_path", "force", "verify", "dry_run", "upload_repo")


@dataclass(frozen=True)
class ConvertConfig:
    """How a checkpoint is converted. A default exists here and nowhere else; names are mlx_lm.convert's if it has one.

    hf_path: a folder, a Hub name, or kaggle:<handle>; revision: the Hub's branch, tag or commit.
    mlx_path: the folder to write; the drafter goes beside it, as `<mlx_path>-assistant`.
    quantize, q_bits, q_group_size, q_mode: None takes the mode's own; recipe: see `recipes`.
    dtype: of the floating-point numbers that stay such; None keeps the source's.
    dequantize: write a quantized source's weights in full.
    draft: None converts the drafter if there is one, True demands one, False leaves it, a name is the drafter's own.
    draft_bits: None is 4 where the target is quantized, and the source's type where it is not.
    keep_towers: copy vision and audio tensors through. allow_nan: let NaN and infinity through.
    force: replace existing output. verify: compare the result with the source. dry_run: only plan.
    """

    hf_path: str
    mlx_path: str = "mlx_model"
    revision: str | None = None
    quantize: bool = False
    q_bits: int | None = None
    q_group_size: int | None = None
    q_mode: str = "affine"
    dtype: str | None = None
    dequantize: bool = False
    recipe: Recipe = "recommended"
    draft: bool | str | None = None
    draft_bits: int | None = None
    keep_towers: bool = False
    allow_nan: bool = False
    force: bool = False
    verify: bool = True
    dry_run: bool = False
    upload_repo: str | None = None

    def __post_init__(self) -> None:
        for name in ("hf_path", "mlx_path"):
            if not str(getattr(self, name)).strip():  # as a path it would be the working directory
                raise RequestError(f"{name} is empty; expected "
                                   + ("a folder or a Hub name" if name == "hf_path" else "the folder to write"))
        if self.recipe not in RECIPES:
            raise RequestError(f"recipe is {self.recipe!r}; expected one of {', '.join(RECIPES)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise RequestError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.quantize and self.dequantize:
            raise RequestError("quantize and dequantize were both asked for; expected one of them")
        if not self.quantize and (self.q_bits, self.q_group_size, self.q_mode) != (None, None, "affine"):
            raise RequestError("q_bits, q_group_size or q_mode was given, but not to quantize: add -q")
        if self.dequantize and self.draft_bits is not None:
            raise RequestError("draft_bits was given together with dequantize; expected one of them")
        _ = self.target_quantization, self.drafter_quantization  # both raise for what mlx does not have

    @property
    def target_quantization(self) -> QuantizationConfig | None:
        return asked(self.q_bits, self.q_group_size, self.q_mode) if self.quantize else None

    @property
    def drafter_quantization(self) -> QuantizationConfig | None:
        if not self.quantize and self.draft_bits is None:
            return None
        return asked_of_drafter(self.draft_bits, self.q_group_size, self.q_mode)

    @property
    def mlx_dtype(self) -> mx.Dtype | None:
        return None if self.dtype is None else DTYPES[self.dtype]

    @property
    def command(self) -> str:
        """The command line that asks for the same."""
        words = ["python", "-m", "mlx_mtp.convert"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default or field.name == "dry_run":
                continue
            flag = f"--{field.name.replace('_', '-')}"
            if value is False:
                words.append(flag.replace("--", "--no-", 1))
            else:
                words += [flag] if value is True else [flag, shlex.quote(str(value))]
        return " ".join(words)

    def that_matter(self) -> dict[str, Any]:
        """The settings that the written bytes depend on, beside the source."""
        return {name: value for name, value in asdict(self).items() if name not in WITHOUT_EFFECT_ON_BYTES}
