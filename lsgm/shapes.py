"""Which images, VAEs and score networks fit together, and the shapes of their latents, without building them.

What the networks themselves need is mirrored here, so that it can be said where params.yaml is read. Without torch.
"""

from __future__ import annotations

from collections.abc import Iterator

from lsgm.config import BackboneConfig, ConvVAEConfig, ImageConfig, PriorConfig, VAEConfig

Shape = tuple[int, int, int]  # channels, height, width

LARGE = 64  # pixels; the paper has 256 and 28 or 32, what lies between is taken for large
NORM_GROUPS = 32  # of the score network's group norms, at most
MAX_CELLS = 500  # of a network, to one of its ends; the largest of the paper has 160


def latent_shapes(vae: BackboneConfig, image: ImageConfig) -> list[Shape]:
    """Of the latents that the prior covers, then of each group of the larger scales, as the decoder draws them."""
    if isinstance(vae, ConvVAEConfig):
        size = image.padded_size // 2 ** halvings(vae)
        return [(vae.latents, size, size)]
    sizes = [image.padded_size // 2 ** (vae.preprocess.blocks + k) for k in range(vae.latent_scales)]
    groups, latents = vae.groups_per_scale, vae.latents_per_group
    return [(groups * latents, sizes[-1], sizes[-1])] + [
        (latents, size, size) for size in sizes[-2::-1] for _ in range(groups)
    ]


def halvings(vae: BackboneConfig) -> int:
    """How often the VAE halves the images on the way to its smallest latents."""
    return len(vae.channel_mult) - 1


def misfits(image: ImageConfig, vae: BackboneConfig, prior: PriorConfig | None = None) -> list[str]:
    """Why no model can be built of these sections, one line for each reason, which begins with its key in a model."""
    found = [*_likelihood(image, vae), *_vae(image, vae)]
    if prior is not None:
        found += _norms(prior, image)
        if prior.cells_per_scale * prior.scales > MAX_CELLS:
            found.append(f"prior.cells_per_scale: {prior.cells_per_scale * prior.scales} residual blocks on the way "
                         f"down, expected at most {MAX_CELLS}")  # fmt: skip
        step, size = 2 ** (prior.scales - 1), latent_shapes(vae, image)[0][1]
        if size % step and image.padded_size % 2 ** halvings(vae) == 0:
            found.append(f"prior.scales: {prior.scales} scales need latents of a size divisible by {step}, not "
                         f"{size}x{size}")  # fmt: skip
    return found


def _likelihood(image: ImageConfig, vae: BackboneConfig) -> Iterator[str]:
    if (vae.likelihood == "bernoulli") != image.binary:
        data, fit = ("binary", "bernoulli") if image.binary else ("not binary", "dml, dl or normal")
        yield f"vae.likelihood: {vae.likelihood!r} does not fit, the images are {data}: use {fit}"
    elif image.binary and image.channels != 1:
        yield f"vae.likelihood: 'bernoulli' is for gray images, not for {image.channels} channels"
    elif vae.likelihood == "dml" and image.channels not in (1, 3):
        yield f"vae.likelihood: 'dml' is for images of 1 or 3 channels, not {image.channels}"


def _vae(image: ImageConfig, vae: BackboneConfig) -> Iterator[str]:
    n = halvings(vae)
    if image.padded_size % 2**n:
        keys = "channel_mult" if isinstance(vae, ConvVAEConfig) else "preprocess.blocks, vae.latent_scales"
        yield f"vae.{keys}: {n} halvings need an image size divisible by {2**n}, not {image.padded_size}"
    if isinstance(vae, VAEConfig):
        towers = 2 * vae.latent_scales * vae.groups_per_scale * max(vae.cells_per_cond, vae.num_nf)
        cells = towers + vae.preprocess.blocks * (vae.preprocess.cells + vae.postprocess.cells)
        if cells > MAX_CELLS:
            yield f"vae.groups_per_scale, vae.cells_per_cond: {cells} residual cells, expected at most {MAX_CELLS}"


def width_multipliers(scales: int, large: bool) -> tuple[int, ...]:
    """Width of each resolution of the score network in multiples of `channels`; ``large``: images of 64 pixels on."""
    if not large or scales <= 3:
        return (1,) * scales
    return {4: (1, 2, 2, 2), 5: (1, 1, 2, 2, 2)}[scales]


def _norms(prior: PriorConfig, image: ImageConfig) -> Iterator[str]:
    """Each group norm parts its feature maps into groups of at least four, as many as there can be up to 32."""
    multipliers = width_multipliers(prior.scales, image.padded_size >= LARGE)

    def bad(channels: int) -> int | None:
        widths = _normalized(channels, multipliers)
        return next((w for w in widths if w < 4 or w % min(w // 4, NORM_GROUPS)), None)

    width = bad(prior.channels)
    if width is not None:
        wider = next(c for c in range(prior.channels + 1, prior.channels + 2 * 4 * NORM_GROUPS + 1) if bad(c) is None)
        lower = next((c for c in range(prior.channels - 1, 3, -1) if bad(c) is None), None)
        groups = f"{width} feature maps do not part evenly into {min(width // 4, NORM_GROUPS)} groups"
        reason = "a group norm needs at least 4 feature maps" if width < 4 else groups
        nearest = f"{lower} or {wider}" if lower is not None else f"{wider}"
        yield f"prior.channels: expected {nearest} or another number that group norm can part, found " \
              f"{prior.channels} ({reason})"  # fmt: skip


def _normalized(channels: int, multipliers: tuple[int, ...]) -> list[int]:
    """Numbers of feature maps that the score network has group norms on: of each level, and where a skip joins it."""
    widths = [channels * m for m in multipliers]
    found = set(widths)
    # On the way up a level's blocks get skips of its own width, and the last one that of the level above it.
    for level, width in enumerate(widths):
        below = widths[level + 1] if level + 1 < len(widths) else width
        above = widths[level - 1] if level > 0 else width
        found |= {below + width, 2 * width, width + above}
    return sorted(found)
