"""Features that need no network: pixels, averaged over squares of 7x7."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from lsgm.config import ExtractorEntry
from lsgm.evaluation.extractors import Extractor


class Pooled(nn.Module):
    """Bytes [B, 1, 28, 28] -> features [B, 16] in [0, 1]."""

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return F.avg_pool2d(images.float() / 255, 7).flatten(1), None


# What the features depend on is this file.
EXTRACTOR = Extractor(
    load=lambda path: Pooled(),
    weights=lambda: Path(__file__),
    dimensions=16,
    distance="frechet_pooled_pixels",
    image_shape=(1, 28, 28),
)
POOLED_PIXELS = ExtractorEntry("lsgm_example_parts.extractor:EXTRACTOR", image_shape=(1, 28, 28))
