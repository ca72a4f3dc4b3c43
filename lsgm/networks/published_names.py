"""The names of our networks' tensors in checkpoints of the authors' release.

Their towers are flat lists that count cells and combiners in the order in which they are built, their score network
is one flat list in the order of the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lsgm.networks.mbconv import MBConvBranch
from lsgm.networks.ncsnpp import NCSNpp, ResidualBlock
from lsgm.networks.nvae import NVAE
from lsgm.networks.nvae_cells import BNSwishBranch, Cell, DownSkip, UpSkip

Pairs = Iterator[tuple[str, str]]  # (prefix of our names, prefix of theirs)


def _cell(ours: str, theirs: str, cell: nn.Module) -> Pairs:
    assert isinstance(cell, Cell)
    branch = cell.branch
    if isinstance(branch, BNSwishBranch):
        for i in (1, 2):
            yield f"{ours}.branch.norm_{i}", f"{theirs}._ops.{i - 1}.bn_act"
            yield f"{ours}.branch.conv_{i}", f"{theirs}._ops.{i - 1}.conv_0"
    elif isinstance(branch, MBConvBranch):
        op, first = f"{theirs}._ops.0.conv", 1 if branch.upsample else 0
        yield f"{ours}.branch.norm_in", f"{op}.{first}.bn"
        for i, name in enumerate(("expand", "depthwise"), 1):
            yield f"{ours}.branch.{name}", f"{op}.{first + i}.conv.0"
            yield f"{ours}.branch.norm_{i}", f"{op}.{first + i}.conv.1"
        yield f"{ours}.branch.project", f"{op}.{first + 3}"
        yield f"{ours}.branch.norm_out", f"{op}.{first + 4}.bn"
    if cell.gate is not None:
        yield f"{ours}.gate.squeeze", f"{theirs}.se.se.0"
        yield f"{ours}.gate.excite", f"{theirs}.se.se.2"
    if isinstance(cell.skip, DownSkip):
        for i in range(4):
            yield f"{ours}.skip.convs.{i}", f"{theirs}.skip.conv_{i + 1}"
    elif isinstance(cell.skip, UpSkip):
        yield f"{ours}.skip.conv", f"{theirs}.skip.1"


def _nvae(vae: NVAE) -> Pairs:
    groups, per_scale = len(vae.posterior_heads), vae.groups_per_scale
    yield "stem", "stem"
    for i, cell in enumerate(vae.preprocess):
        yield from _cell(f"preprocess.{i}", f"pre_process.{i}", cell)
    place = 0
    for g, cells in enumerate(vae.encoder_groups):
        for i, cell in enumerate(cells):  # type: ignore[arg-type]
            yield from _cell(f"encoder_groups.{g}.{i}", f"enc_tower.{place}", cell)
            place += 1
        if g < groups - 1:  # theirs stand behind the group that they serve, ours in the decoder's order
            yield f"encoder_combiners.{groups - 2 - g}", f"enc_tower.{place}.conv"
            place += 1
        scale, last = divmod(g + 1, per_scale)
        if last == 0 and scale <= len(vae.encoder_down):
            yield from _cell(f"encoder_down.{scale - 1}", f"enc_tower.{place}", vae.encoder_down[scale - 1])
            place += 1
    for i in range(len(vae.input_pyramid)):
        yield f"input_pyramid.{i}.norm", f"progressive_input_cells.{i}.conv.bn_act"
        yield f"input_pyramid.{i}.conv", f"progressive_input_cells.{i}.conv.conv_0"
    place = 0
    for g, cells in enumerate(vae.decoder_groups):
        yield f"posterior_heads.{g}", f"enc_sampler.{g}.1"
        yield f"latent_convs.{g}", f"eps_conv.{g}"
        yield f"decoder_mixers.{g}", f"dec_tower.{place}.conv"
        place += 1
        for i, cell in enumerate(cells):  # type: ignore[arg-type]
            yield from _cell(f"decoder_groups.{g}.{i}", f"dec_tower.{place}", cell)
            place += 1
        scale, last = divmod(g + 1, per_scale)
        if last == 0 and scale <= len(vae.decoder_up):
            yield from _cell(f"decoder_up.{scale - 1}", f"dec_tower.{place}", vae.decoder_up[scale - 1])
            place += 1
    for g, flow in enumerate(vae.flows):
        steps = flow.steps
        assert isinstance(steps, nn.ModuleList)
        for i in range(len(steps)):
            theirs = f"nf_cells.{g * len(steps) // 2 + i // 2}.cell{i % 2 + 1}"
            yield f"flows.{g}.steps.{i}.conv_in", f"{theirs}.conv.convz.0"
            yield f"flows.{g}.steps.{i}.depthwise", f"{theirs}.conv.convz.2"
            yield f"flows.{g}.steps.{i}.conv_out", f"{theirs}.mu.conv_0"
    for i, cell in enumerate(vae.postprocess):
        yield from _cell(f"postprocess.{i}", f"post_process.{i}", cell)
    yield "output_head", "image_conditional.1"


def _ncsnpp(network: NCSNpp) -> Pairs:
    yield "embedding", "temb_fun"  # Fourier embeddings only
    yield "embedding.linear_1", "all_modules.0"
    yield "embedding.linear_2", "all_modules.1"
    yield "conv_in", "all_modules.2"
    stages: dict[str, nn.Module] = {f"down.{i}": stage for i, stage in enumerate(network.down)}
    stages["middle"] = network.middle
    stages |= {f"up.{i}": stage for i, stage in enumerate(network.up)}
    blocks = [(f"{name}.{i}", module) for name, stage in stages.items() for i, module in stage.named_children()]
    for place, (name, module) in enumerate(blocks, 3):
        if isinstance(module, ResidualBlock):
            parts = ["norm_1:GroupNorm_0", "conv_1:Conv_0", "time:Dense_0", "norm_2:GroupNorm_1", "conv_2:Conv_1"]
            parts += ["shortcut:Conv_2"] if module.shortcut is not None else []
        else:
            parts = ["norm:GroupNorm_0", "query:NIN_0", "key:NIN_1", "value:NIN_2", "out:NIN_3"]
        for ours, theirs in (part.split(":") for part in parts):
            yield f"{name}.{ours}", f"all_modules.{place}.{theirs}"
    yield "norm_out", f"all_modules.{place + 1}"
    yield "conv_out", f"all_modules.{place + 2}"


def published_names(network: NVAE | NCSNpp) -> dict[str, str]:
    """Our name of each tensor of ``network``'s state -> its name in a published checkpoint.

    Attention's matrices (`NIN_k.W`) are stored transposed there, [in, out].
    """
    pairs = dict(_nvae(network) if isinstance(network, NVAE) else _ncsnpp(network))
    names = {}
    for ours in network.state_dict():
        if ours == "top":
            names[ours] = "prior_ftr0"
            continue
        prefix, leaf = ours.rsplit(".", 1)
        theirs = pairs[prefix]
        if ".NIN_" in theirs:
            leaf = {"weight": "W", "bias": "b"}[leaf]
        names[ours] = f"{theirs}.{leaf}"
    return names
