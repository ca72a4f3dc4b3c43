"""LSGM: score-based generative modeling in latent space (Vahdat, Kreis, Kautz, NeurIPS 2021).

>>> import lsgm
>>> model = lsgm.load("checkpoints/lsgm/mnist_demo")
>>> x = model.sample(64, seed=0)  # [64, 1, 28, 28] in [0, 1]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from lsgm.model import LSGM

__all__ = ["load"]


def load(folder: str | Path, device: str = "cpu") -> LSGM:
    """Read the model in ``folder``, as `lsgm pretrain` or `lsgm train` wrote it, or in a published checkpoint file.

    See :func:`lsgm.checkpoint.load` and :func:`lsgm.published.load`; raises :class:`lsgm.errors.LSGMError` as they do,
    and where ``device`` is not there.
    """
    from lsgm import checkpoint, published  # late: the workflow imports lsgm.config and must not wait for torch
    from lsgm.arguments import check_device

    check_device(device)
    return published.load(folder, device) if published.is_published(folder) else checkpoint.load(folder, device)
