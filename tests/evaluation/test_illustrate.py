"""Figures of a model's latents: what they show is what the model encodes and samples."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from lsgm import checkpoint
from lsgm.config import ConvVAEConfig, ImageConfig, NCSNppConfig, SampleConfig, SDEConfig
from lsgm.config.stages import IllustrateStage
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError
from lsgm.evaluation import illustrate as module
from lsgm.evaluation.illustrate import along_the_ode, illustrate, mixing_coefficients, slerp, to_bytes
from lsgm.model import LSGM

CPU = torch.device("cpu")
STAGE = IllustrateStage(
    model="tiny", dataset="mnist", sample=SampleConfig(count=8, tol=1e-4, time_eps=0.01, batch=16, seed=3)
)


def tiny(mixed: bool = True, prior: bool = True) -> LSGM:
    """Untrained, its prior not N(0, I)."""
    vae = ConvVAEConfig(backbone="conv", channels=4, channel_mult=[1, 2, 2, 2], latents=4)
    score = NCSNppConfig(
        channels=8,
        scales=1,
        cells_per_scale=1,
        dropout=0,
        embedding_dim=16,
        mixing_logit_init=0,
        mixed_prediction=mixed,
    )
    image = ImageConfig(channels=1, size=28, padded_size=32, binary=True)
    torch.manual_seed(0)
    model = LSGM(image, vae, *((score, SDEConfig(time_eps=0.01)) if prior else ()))
    for part, std in ((model.vae, 1.0), (model.prior, 0.05)):
        for parameter in part.parameters() if part is not None else ():
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def saved(model: LSGM, folder: Path) -> Path:
    checkpoint.save(model, folder, [], {})
    pd.DataFrame({"epoch": [0.5, 1.0], "alpha_mean": [0.4, 0.5]}).to_csv(folder / "history.csv", index=False)
    return folder


def test_the_ends_of_an_interpolation_are_the_reconstructions(
    mnist_store: ImageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There and back along the ODE, to its tolerance."""
    shown: dict[str, dict[str, torch.Tensor]] = {}

    def keep(panels: dict[str, torch.Tensor], path: Path, columns: int | None = None, scale: int = 2) -> None:
        shown[path.name] = panels
        save(panels, path, columns, scale)

    save = module.save_panels
    monkeypatch.setattr(module, "save_panels", keep)
    illustrate(STAGE, mnist_store.path, saved(tiny(), tmp_path / "model"), tmp_path / "out", CPU)
    real, reconstructed = shown["tiny_reconstructions.png"].values()
    columns = shown["tiny_interpolation.png"]
    rows = module.ROWS
    assert torch.equal(columns["A"], real[:rows])
    assert torch.equal(columns["B"], real[rows : 2 * rows])
    for end, expected in (("0", reconstructed[:rows]), ("1", reconstructed[rows : 2 * rows])):
        assert (columns[end].int() - expected.int()).abs().max() <= 2
    assert (columns["0.5"].int() - reconstructed[:rows].int()).abs().max() > 5
    for name in ("reconstructions", "interpolation", "ode", "mixing"):
        with Image.open(tmp_path / "out" / f"tiny_{name}.png") as picture:
            assert picture.width > 300


def test_ten_test_images_make_five_rows(small_store: ImageStore, tmp_path: Path) -> None:
    stage = STAGE.model_copy(update={"sample": STAGE.sample.model_copy(update={"tol": 1e-2})})
    illustrate(stage, small_store.path, saved(tiny(), tmp_path / "model"), tmp_path / "out", CPU)
    five, eight = (Image.open(tmp_path / "out" / f"tiny_{name}.png").height for name in ("interpolation", "ode"))
    assert five < eight


def test_the_ode_ends_in_the_samples() -> None:
    model = tiny()
    assert model.prior is not None
    columns = along_the_ode(model, model.prior, seed=3, tol=1e-4, time_eps=0.01)
    assert next(iter(columns)) == "t = 1"
    assert list(columns)[-1] == "0.01"
    samples = to_bytes(model.sample(module.ROWS, seed=3, solver="rk45", tol=1e-4, time_eps=0.01))
    assert (columns["0.01"].int() - samples.int()).abs().max() <= 2
    assert not torch.equal(columns["t = 1"], columns["0.01"])


def test_slerp_keeps_the_length_and_the_ends() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 4, 8, 8).unbind()
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    unit = [x / x.flatten(1).norm(dim=1)[:, None, None, None] for x in (a, b)]
    torch.testing.assert_close(slerp(*unit, 0.3).flatten(1).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(slerp(a, a, 0.5), a)


def test_mixing_coefficients() -> None:
    mixed, alone = tiny().prior, tiny(mixed=False).prior
    assert mixed is not None and mixed.mixing_logit is not None and alone is not None
    with torch.no_grad():
        mixed.mixing_logit.fill_(0.0)
    mixed.deactivate(torch.tensor([False, True, False, False]))
    assert mixing_coefficients(mixed).tolist() == [0.5, 0.0, 0.5, 0.5]
    assert mixing_coefficients(alone).tolist() == [1.0] * 4


def test_what_cannot_be_shown_is_said(mnist_store: ImageStore, tmp_path: Path) -> None:
    vae = saved(tiny(prior=False), tmp_path / "vae")
    with pytest.raises(LSGMError, match="vae: is a VAE with the prior N\\(0, I\\); give the folder of an LSGM"):
        illustrate(STAGE, mnist_store.path, vae, tmp_path / "out", CPU)
    lsgm = saved(tiny(), tmp_path / "lsgm")
    with pytest.raises(LSGMError, match="mnist: the figures need two test images"):
        module._test_images(tiny(), mnist_store, 0, 1)
    (lsgm / "history.csv").unlink()
    with pytest.raises(LSGMError, match=r"history\.csv: cannot be read"):
        illustrate(STAGE, mnist_store.path, lsgm, tmp_path / "out", CPU)
