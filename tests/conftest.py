"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lsgm.config import DatasetConfig, PrepareStage
from lsgm.data.store import ImageStore, prepare


@pytest.fixture(scope="session")
def mnist_store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """The real MNIST: from LSGM_TEST_DATA (made there if it is empty), else data/mnist, else a temporary folder."""
    chosen = os.environ.get("LSGM_TEST_DATA")
    path = Path(chosen) if chosen else Path(__file__).parents[1] / "data" / "mnist"
    if not chosen and not (path / "manifest.json").exists():
        path = tmp_path_factory.mktemp("data") / "mnist"
    if not (path / "manifest.json").exists():
        prepare(PrepareStage(dataset="mnist", source=DatasetConfig(path=None)), path)
    return ImageStore(path)
