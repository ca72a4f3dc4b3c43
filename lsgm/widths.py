"""The widths of the score network at each resolution. Without torch: params.yaml is checked against them."""

from __future__ import annotations

LARGE = 64  # pixels from which images are large; the paper has 256 and 28 or 32


def width_multipliers(scales: int, image_size: int) -> tuple[int, ...]:
    """Width of each resolution of the NCSN++ in multiples of `channels` (LSGM, appendix G, tables 7 and 8)."""
    if image_size < LARGE or scales <= 3:
        return (1,) * scales
    return {4: (1, 2, 2, 2), 5: (1, 1, 2, 2, 2)}[scales]
