"""What can be swapped: a registry for each kind of part, with ours and those of installed packages.

An entry is a name and the place of an object, "module:name", that is imported when it is asked for. A package adds
entries through Python's entry points in its pyproject.toml::

    [project.entry-points."lsgm.score_networks"]
    my_network = "my_package.my_network:MyNetworkConfig"

Nothing here imports torch, and neither do the objects that our entries name.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from lsgm.errors import LSGMError


def load(place: Any) -> Any:
    """The object at ``place``, "module:name"; what is no text is taken for the object itself."""
    if not isinstance(place, str):
        return place
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def module_of(place: Any) -> str:
    """The module that the object at ``place`` is defined in."""
    return place.partition(":")[0] if isinstance(place, str) else str(place.__module__)


class Registry:
    """The entries of one kind of part, by name.

    Args:
        kind: what one is called in messages.
        group: the group of entry points through which packages add theirs.
        ours: name -> place of the object that describes the part, without torch.
    """

    def __init__(self, kind: str, group: str, ours: Mapping[str, str]) -> None:
        self.kind, self.group, self.ours = kind, group, ours

    @functools.cached_property
    def places(self) -> dict[str, str]:
        """The place of each entry: ours, then those of installed packages."""
        found = dict(self.ours)
        for point in entry_points(group=self.group):
            if found.setdefault(point.name, point.value) != point.value:
                raise LSGMError(
                    f"two packages call a {self.kind} {point.name!r}: {found[point.name]} and {point.value} (entry "
                    f"points {self.group}); uninstall one of them, or give its entry another name"
                )
        return found

    def names(self) -> tuple[str, ...]:
        """The names of all entries."""
        return tuple(self.places)

    def entry(self, name: str) -> Any:
        """The object that describes the part ``name``.

        Raises:
            LSGMError: there is none, or the package that offers it cannot be imported.
        """
        if name not in self.places:
            raise LSGMError(f"there is no {self.kind} {name!r}; there are {', '.join(self.places)}")
        try:
            return load(self.places[name])
        except Exception as error:
            if name in self.ours:
                raise
            raise LSGMError(
                f"the {self.kind} {name!r} of an installed package cannot be imported: {self.places[name]} (entry "
                f"point {self.group}): {type(error).__name__}: {error}; mend or uninstall that package"
            ) from error

    def entries(self) -> dict[str, Any]:
        """All entries that can be imported, by name; a line in the log tells of the others."""
        found = {}
        for name in self.places:
            try:
                found[name] = self.entry(name)
            except LSGMError as error:
                logging.getLogger("lsgm").warning("%s", error)
        return found


BACKBONES = Registry(
    "backbone",
    "lsgm.backbones",
    {"nvae": "lsgm.config.backbones:VAEConfig", "conv": "lsgm.config.backbones:ConvVAEConfig"},
)
SCORE_NETWORKS = Registry("score network", "lsgm.score_networks", {"ncsnpp": "lsgm.config.priors:NCSNppConfig"})
SDES = Registry(
    "SDE",
    "lsgm.sdes",
    dict.fromkeys(("vpsde", "geometric_vpsde", "sub_vpsde", "vesde"), "lsgm.config.sdes:SDEConfig"),
)
SOLVERS = Registry(
    "solver",
    "lsgm.solvers",
    dict.fromkeys(
        ("ab", "ddim", "dpmpp_2m", "deis", "edm", "euler", "heun", "rk4", "rk45", "ancestral", "adaptive_sde"),
        "lsgm.config.sampling:SampleConfig",
    ),
)
LIKELIHOODS = Registry(
    "likelihood",
    "lsgm.likelihoods",
    {
        "bernoulli": "lsgm.config.likelihoods:BERNOULLI",
        "dml": "lsgm.config.likelihoods:LOGISTIC_MIXTURE",
        "dl": "lsgm.config.likelihoods:DISCRETIZED_LOGISTIC",
        "normal": "lsgm.config.likelihoods:NORMAL",
    },
)
DATASETS = Registry("dataset format", "lsgm.datasets", {"images": "lsgm.config.data:DatasetConfig"})
EXTRACTORS = Registry(
    "extractor",
    "lsgm.extractors",
    {
        "inception": "lsgm.config.extractors:INCEPTION",
        "efficientnet_lite0": "lsgm.config.extractors:EFFICIENTNET_LITE0",
        "mnist_classifier": "lsgm.config.extractors:MNIST_CLASSIFIER",
    },
)
REGISTRIES = (BACKBONES, SCORE_NETWORKS, SDES, SOLVERS, LIKELIHOODS, DATASETS, EXTRACTORS)
