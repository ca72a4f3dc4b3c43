"""Check that the models and prepared datasets below a folder are unchanged since they were saved."""

from __future__ import annotations

from pathlib import Path

from lsgm import checkpoint
from lsgm.data.store import MANIFEST, ImageStore
from lsgm.errors import LSGMError
from lsgm.progress import log


def verify(folder: Path) -> None:
    """Check all models and datasets in ``folder`` and below it against their hashes, and log the result.

    Raises:
        LSGMError: a file is missing or altered, or there is neither a model nor a dataset.
    """
    models = _folders(folder, "config.json", "model.safetensors")
    stores = _folders(folder, MANIFEST, "*_images.npy")
    if not models and not stores:
        raise LSGMError(
            f"{folder}: holds no model and no dataset; expected one of them, or a folder that contains some"
        )
    for store in stores:
        ImageStore(store).verify()
    for model in models:
        checkpoint.verify_history(model)
    unchecked = [f"{model}/{name}" for model in models for name in checkpoint.verify(model).unchecked]
    counts = [f"{len(found)} {what}" for found, what in ((models, "models"), (stores, "datasets")) if found]
    log.info(f"{folder}: {' and '.join(counts)} unchanged since they were saved")
    if unchecked:
        log.warning(f"{', '.join(unchecked)}: cannot be checked: saved by a version that did not record their sha256")


def _folders(root: Path, *patterns: str) -> list[Path]:
    """The folders below ``root`` with files that match ``patterns``, except hidden folders (unfinished datasets)."""
    found = {path.parent for pattern in patterns for path in root.rglob(pattern)}
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))
