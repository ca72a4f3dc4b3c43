"""The images: how a dataset's originals are read, and what a model sees of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lsgm.config.bounds import BelowOne, Channels, Number, Pixels, Seed
from lsgm.config.mistakes import shown
from lsgm.config.section import Part, Section


class ImagesConfig(Section):
    """How the images of a dataset of your own are read."""

    size: Pixels = Field(description="height and width of the stored images")
    channels: Annotated[Literal[1, 3], Number] = Field(3, description="3: RGB; 1: gray")
    crop: Pixels | None = Field(
        None, description="side of the centered square that is cut out and resized to `size`; null: the largest square"
    )
    split: Annotated[BelowOne, Field(gt=0)] | None = Field(
        0.1,
        description="fraction of the images in the random test set; null: there are folders train and test",
    )
    seed: Seed = Field(0, description="seed of the random train/test split")
    binary: bool = Field(
        False, description="each time an image is seen, its pixels are drawn from Bernoulli(intensity)"
    )

    @model_validator(mode="after")
    def _binary_images_are_gray(self) -> ImagesConfig:
        if self.binary and self.channels != 1:
            raise ValueError(f"binary: true is for gray images, channels: 1, not {self.channels}")
        return self


class DatasetConfig(Part):
    """Where a dataset comes from. A dataset of your own also has `images`, which say what it is."""

    implementation = "lsgm.data.images:Images"

    format: Literal["images"] = Field("images", description="how the originals are read")
    path: str | None = Field(
        None,
        description="folder or file with the original files (the README says which), or with {split}_images.npy; null: "
        "download them, where that is possible",
    )
    images: ImagesConfig | None = Field(None, description="for a dataset of your own: images in a folder, zip or LMDB")

    @field_validator("path")
    @classmethod
    def _can_be_a_path(cls, path: str | None) -> str | None:
        if path is None:
            return None
        way_out = "expected a folder or file, or null to download the dataset"
        if not path.strip():
            raise ValueError(f"is empty; {way_out}")
        if "\0" in path or len(path) > 4095 or any(len(part.encode()) > 255 for part in path.split("/")):
            reason = "holds a NUL character" if "\0" in path else "is longer than a path may be"
            raise ValueError(f"{reason}: {shown(path)}; {way_out}")
        try:
            Path(path).expanduser()
        except RuntimeError:
            user = path.partition("/")[0]
            raise ValueError(
                f"{user}: there is no such user; write the whole path, or ./{user} for a folder of this name"
            ) from None
        return path


class ImageConfig(Section):
    """The images that a model works on; follows from the dataset."""

    channels: Channels
    size: Pixels = Field(description="height and width of an image, as it is generated and evaluated")
    padded_size: Pixels = Field(description="height and width as the network sees it, the border filled with zeros")
    binary: bool = Field(description="each time an image is seen, its pixels are drawn from Bernoulli(intensity)")


class DatasetFormatConfig(Part):
    """A dataset in a format that an installed package reads; subclass it, and give it a `format` of its own.

    The implementation is a :class:`lsgm.data.formats.Format`.
    """

    not_passed = frozenset({"format", "path"})

    format: str
    path: str = Field(description="folder or file with the original files")

    def image(self) -> ImageConfig:
        """The images that a model sees."""
        raise NotImplementedError(f"{type(self).__name__} must define image()")
