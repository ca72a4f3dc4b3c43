"""Convert between checkpoints of the authors' release and our model folders."""

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
    """Write the model in the folder ``model`` to the file ``out`` in the authors' format.

    ``dataset`` is the authors' name of the dataset; None: the dataset on which the model was trained.

    Raises:
        LSGMError: the folder holds no model, or a model without a record of its dataset.
    """
    if dataset is None:
        found = [stage["dataset"] for stage in checkpoint.stages(model)]
        if not found:
            raise LSGMError(f"{model}: has no record of its dataset; name it, for example: --dataset cifar10")
        dataset = found[-1]
    published.export(checkpoint.load(model), out, str(dataset))
    log.info(f"{out}: written")
