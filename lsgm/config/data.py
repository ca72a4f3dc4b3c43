"""Images: how a dataset's original files are read, and in which form a model sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lsgm.config.bounds import BelowOne, Channels, Number, Pixels, Seed
from lsgm.config.mistakes import shown
from lsgm.config.section import Part, Section


class ImagesConfig(Section):
    """How the images of a custom dataset are read."""

    size: Pixels = Field(description="height and width of the stored images in pixels")
    channels: Annotated[Literal[1, 3], Number] = Field(3, description="number of channels; 3: RGB, 1: grayscale")
    crop: Pixels | None = Field(
        None, description="side of the center crop in pixels, which is resized to `size`; null: the largest square"
    )
    split: Annotated[BelowOne, Field(gt=0)] | None = Field(
        0.1,
        description="fraction of the images drawn at random as the test set; null: use the folders train and test",
    )
    seed: Seed = Field(0, description="seed of the random train/test split")
    binary: bool = Field(
        False, description="binarize pixels at random, x ~ Bernoulli(intensity), each time an image is used"
    )

    @model_validator(mode="after")
    def _binary_images_are_gray(self) -> ImagesConfig:
        if self.binary and self.channels != 1:
            raise ValueError(f"binary: true needs grayscale images (channels: 1), found channels: {self.channels}")
        return self


class DatasetConfig(Part):
    """Where a dataset comes from. A custom dataset also has `images`, which describes its contents."""

    implementation = "lsgm.data.images:Images"

    format: Literal["images"] = Field("images", description="format of the original files")
    path: str | None = Field(
        None,
        description="folder or file with the original files (the README lists them), or a folder with "
        "{split}_images.npy; null: download them if possible",
    )
    images: ImagesConfig | None = Field(
        None, description="for a custom dataset: how to read images in a folder, zip archive, LMDB or TFRecord files"
    )

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
                f"{user}: there is no such user; write the full path, or ./{user} for a folder of this name"
            ) from None
        return path


class ImageConfig(Section):
    """The images that a model works on; determined by the dataset."""

    channels: Channels
    size: Pixels = Field(description="height and width of the images that are generated and evaluated, in pixels")
    padded_size: Pixels = Field(description="height and width of the network's input in pixels; the border is zero")
    binary: bool = Field(description="binarize pixels at random, x ~ Bernoulli(intensity), each time an image is used")


class DatasetFormatConfig(Part):
    """A dataset in a format that a plugin reads. To add a format, subclass this and give `format` a new value.

    The implementation is a :class:`lsgm.data.formats.Format`.
    """

    not_passed = frozenset({"format", "path"})

    format: str
    path: str = Field(description="folder or file with the original files")

    def image(self) -> ImageConfig:
        """The images in the form in which a model sees them."""
        raise NotImplementedError(f"{type(self).__name__} must define image()")
