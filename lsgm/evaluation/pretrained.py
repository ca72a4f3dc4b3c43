"""Files of weights that others have published: found on this machine or downloaded, and their content checked."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from lsgm.data.download import fetch
from lsgm.errors import LSGMError
from lsgm.files import sha256
from lsgm.progress import log

FOLDER = "LSGM_WEIGHTS"  # environment variable: a folder to look in first


@dataclass(frozen=True)
class WeightsFile:
    """One published file of weights."""

    name: str
    url: str
    sha256: str
    size: int  # bytes
    library_folder: Path | None = None  # where the library that it belongs to keeps it, other than torch's cache

    def find(self) -> Path:
        """Its path, from the first of $LSGM_WEIGHTS, torch's cache and the library's own folder that holds it.

        Where none does it is downloaded to the first of them. A network that is not there is given up on in seconds.
        Raises :class:`LSGMError` that says where to put the file.
        """
        folders = [Path(os.environ[FOLDER]).expanduser()] if os.environ.get(FOLDER) else []
        folders.append(Path(torch.hub.get_dir()) / "checkpoints")
        folders += [self.library_folder] if self.library_folder is not None else []
        for path in (folder / self.name for folder in folders):
            if path.is_file():
                if (digest := sha256(path)) != self.sha256:
                    raise LSGMError(
                        f"{path}: is damaged or another file (sha256 {digest}, expected {self.sha256}); remove it, and "
                        "it is downloaded again"
                    )
                return path
        path = folders[0] / self.name
        log.info(f"{path}: not there, downloading it")
        try:
            fetch([self.url], self.sha256, path, size=self.size)
        except (LSGMError, OSError) as error:
            raise LSGMError(
                f"{error}\n{path}: the weights could not be downloaded. Where there is a network get {self.url} "
                f"({self.size / 1e6:.1f} MB, sha256 {self.sha256}) and put it there, or into a folder named by the "
                f"environment variable {FOLDER}"
            ) from None
        return path
