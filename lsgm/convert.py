"""Convert between checkpoints of the authors' release and the folders of our models."""

from __future__ import annotations

from pathlib import Path

from lsgm import checkpoint, published
from lsgm.errors import LSGMError
from lsgm.progress import log


def import_published(file: Path, out: Path) -> None:
    """Turn the published checkpoint ``file``, of a VAE or an LSGM, into the model folder ``out``."""
    model = published.load(file)
    checkpoint.save(model, out, stages=[], summary={"imported_from": file.name})
    log.info(f"{out}: {'LSGM' if model.prior is not None else 'VAE'}, latents {list(model.latent_shape)}")


def export_published(model: Path, out: Path, dataset: str | None) -> None:
    """Write the model in the folder ``model`` to the file ``out`` as the authors' code reads it.

    ``dataset`` is the authors' name of the dataset; None: the one that the model was trained on.

    Raises:
        LSGMError: the folder holds no model, or one that does not say what it was trained on.
    """
    if dataset is None:
        found = [stage["dataset"] for stage in checkpoint.stages(model)]
        if not found:
            raise LSGMError(f"{model}: does not say what it was trained on; name it: --dataset cifar10")
        dataset = found[-1]
    published.export(checkpoint.load(model), out, str(dataset))
    log.info(f"{out}: written")
