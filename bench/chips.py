"""Apple's chips as the bytes model sees them: how many bytes and how many multiplications a second."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_mtp.errors import RequestError

FLOP_PER_CORE_AND_CYCLE = 256  # 128 lanes of float32, each a multiplication and an addition
FIRST_WIDE_GENERATION = 3  # MLX reads affine weights once for several rows from M3 on (its qmv_wide kernels)


@dataclass(frozen=True)
class Chip:
    """bandwidth: GB/s (10^9 bytes); cores: of the GPU; clock: GHz."""

    name: str
    bandwidth: float
    cores: int
    clock: float

    @property
    def generation(self) -> int:
        """M3 Ultra -> 3."""
        return int(self.name.split()[0][1:])

    @property
    def has_wide_kernels(self) -> bool:
        return self.generation >= FIRST_WIDE_GENERATION

    @property
    def bytes_per_second(self) -> float:
        return self.bandwidth * 1e9

    @property
    def flop_per_second(self) -> float:
        return self.cores * FLOP_PER_CORE_AND_CYCLE * self.clock * 1e9


# Bandwidth and cores: Apple's technical specifications of the Macs with each chip, in its fullest form unless the cores
# are named (M1: from its memory, LPDDR4X-4266 on 128 bits; Apple's page does not say).
# Clock: Apple states none. These are from public GPU data bases, which differ by up to a tenth; so peak FLOP/s are
# estimates: cores x 128 lanes x 2 x clock, of the shader cores. M5's Neural Accelerators are left out: the products of
# a few rows that decoding is made of do not go through them.
CHIPS = {chip.name: chip for chip in (
    Chip("M1", 68, 8, 1.278),
    Chip("M1 Pro", 200, 16, 1.296),
    Chip("M1 Max", 400, 32, 1.296),
    Chip("M1 Ultra", 800, 64, 1.296),
    Chip("M2", 100, 10, 1.398),
    Chip("M2 Pro", 200, 19, 1.398),
    Chip("M2 Max", 400, 38, 1.398),
    Chip("M2 Ultra", 800, 76, 1.398),
    Chip("M3", 100, 10, 1.398),
    Chip("M3 Pro", 150, 18, 1.398),
    Chip("M3 Max 30-core", 300, 30, 1.398),
    Chip("M3 Max", 400, 40, 1.398),
    Chip("M3 Ultra", 819, 80, 1.398),
    Chip("M4", 120, 10, 1.470),
    Chip("M4 Pro", 273, 20, 1.578),
    Chip("M4 Max 32-core", 410, 32, 1.578),
    Chip("M4 Max", 546, 40, 1.578),
    Chip("M5", 153, 10, 1.740),
    Chip("M5 Pro", 307, 20, 1.740),
    Chip("M5 Max 32-core", 460, 32, 1.740),
    Chip("M5 Max", 614, 40, 1.740),
)}


def chip(name: str) -> Chip:
    """Raises RequestError for a chip that is not in the table."""
    if name not in CHIPS:
        raise RequestError(f"chip is {name!r}; expected one of {', '.join(CHIPS)}")
    return CHIPS[name]
