"""Validation while a model trains: the NELBO of a few test images, and samples."""

from __future__ import annotations

import torch
from torch import Tensor

from lsgm.data.batches import preprocess
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError
from lsgm.model import LSGM
from lsgm.networks.posterior import Backbone
from lsgm.prior import ScorePrior
from lsgm.progress import log


class Validation:
    """Test NELBO (nats/image), NFE and samples of ``model``, with ``prior`` and ``vae`` in place of its own.

    Uses no random numbers of PyTorch's global generators, changes no statistics and restores the mode of every module.

    Args:
        images: number of test images, and of samples; both are the same in every validation.
        prior: a prior with averaged weights.
        vae: a VAE with averaged weights; the model's own if None.
    """

    def __init__(
        self,
        model: LSGM,
        store: ImageStore,
        images: int,
        prior: ScorePrior | None = None,
        vae: Backbone | None = None,
    ) -> None:
        self.model, self.prior, self.vae = model, prior, vae or model.vae
        stored = torch.tensor(store.images("test")[:images], dtype=torch.uint8)
        generator = torch.Generator().manual_seed(0)
        self.x = preprocess(stored, generator, model.image.size, model.image.binary).to(model.device)

    @torch.no_grad()
    def __call__(self) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Measurements for the history, and images [N, C, H, W] in [0, 1]."""
        model, own, own_vae = self.model, self.model.prior, self.model.vae
        modes = {}
        try:
            model.prior, model.vae = self.prior, self.vae
            modes = {module: module.training for module in model.modules()}
            with torch.compiler.set_stance("force_eager"):  # compiling for these shapes would take longer
                terms = model.nelbo_terms(self.x, model.per_sample_noise(0, range(len(self.x))))
                samples, info = model.sample(len(self.x), return_info=True)
        except LSGMError as error:  # the solver's: of a model that is falling apart, which is the engine's to see
            log.info(f"validation skipped: {error}")
            return {}, {}
        finally:
            model.prior, model.vae = own, own_vae
            for module, training in modes.items():
                module.training = training
        facts = {"test_nelbo": terms.nelbo.mean().item()}
        if self.prior is not None:
            facts |= {"test_nfe": float(terms.nfe), "sampling_nfe": info.nfe}
        return facts, {"samples": samples}
