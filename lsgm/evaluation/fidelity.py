"""How near generated images are to real ones: FID and its kin, by torch-fidelity's formulas from our statistics.

    d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))            (Heusel et al., arXiv 1706.08500, eq. 6)

is the FID for the features of Inception-v3 and for nothing else; that of other features is `frechet_<extractor>`.
"""

from __future__ import annotations

import numpy as np

from lsgm.errors import LSGMError
from lsgm.evaluation.extractors import clean_fid, extractor, torch_fidelity
from lsgm.evaluation.statistics import Moments, Statistics

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3  # whose farthest is the radius of an image's ball, in precision and recall


def frechet_distance(one: Statistics, two: Statistics) -> float:
    """Squared Fréchet distance d^2, the number that is reported as FID.

    By convention ``two`` is the whole training set. The distance of two finite sets from the same distribution is above
    0 and falls with their size: quote the number of samples and :func:`real_vs_real` beside it.
    Raises :class:`LSGMError` where the features are not of one extractor.
    """
    if one.extractor != two.extractor:
        raise LSGMError(f"Fréchet distance: {one.extractor} features do not compare with those of {two.extractor}")
    return _distance(one.extractor, one.moments, two.moments)


def real_vs_real(reference: Statistics, n: int, seed: int, repeats: int = 5) -> float:
    """The distance between two disjoint random sets of ``n`` real images, averaged over ``repeats`` draws.

    Drawn from those whose features ``reference`` kept, at least 2 n. Of two equally good sets of N images, one against
    M >> N images scores about half of this: only one of the two sets is then small. Raises :class:`LSGMError`.
    """
    features = reference.features
    if len(features) < 2 * n:
        raise LSGMError(f"real_vs_real: two disjoint sets of {n} need {2 * n} real images, there are {len(features)}")
    rng = np.random.default_rng(seed)
    draws = [np.split(rng.choice(len(features), 2 * n, replace=False), 2) for _ in range(repeats)]
    distances = [_distance(reference.extractor, *(Moments.of(features[half]) for half in pair)) for pair in draws]
    return float(np.mean(distances))


def metrics(samples: Statistics, reference: Statistics) -> dict[str, float]:
    """All metrics of generated images against real ones, each under the name of its extractor.

    `fid` or `frechet_<extractor>`, from all images; `kid_<extractor>` and its spread over subsets (Binkowski et al.,
    arXiv 1801.01401), `precision_<extractor>` and `recall_<extractor>` (Kynkaanniemi et al., arXiv 1904.06991), from as
    many generated as real ones of those whose features were kept; `inception_score` and its spread over ten parts
    (Salimans et al., arXiv 1606.03498), where there are Inception's logits. `clean_fid` stands alone.
    """
    name = samples.extractor
    found = {extractor(name).distance: frechet_distance(samples, reference)}
    if name == "clean_fid":
        return found
    library = torch_fidelity()
    n = kept(samples, reference)
    pair = samples.features[:n], reference.features[:n]  # generated, then real: the order decides which is precision
    kid = library.metric_kid.kid_features_to_metric(
        *pair, kid_subsets=KID_SUBSETS, kid_subset_size=min(KID_SUBSET_SIZE, n), verbose=False
    )
    found[f"kid_{name}"] = kid[library.metric_kid.KEY_METRIC_KID_MEAN]
    found[f"kid_{name}_std"] = kid[library.metric_kid.KEY_METRIC_KID_STD]
    if n > NEIGHBOURS:
        prc = library.metric_prc.prc_features_to_metric(
            *pair, prc_neighborhood=NEIGHBOURS, prc_batch_size=1000, save_cpu_ram=True, verbose=False
        )
        found[f"precision_{name}"] = prc[library.metric_prc.KEY_METRIC_PRECISION]
        found[f"recall_{name}"] = prc[library.metric_prc.KEY_METRIC_RECALL]
    if samples.logits is not None:
        score = library.metric_isc.isc_features_to_metric(samples.logits)
        found["inception_score"] = score[library.metric_isc.KEY_METRIC_ISC_MEAN]
        found["inception_score_std"] = score[library.metric_isc.KEY_METRIC_ISC_STD]
    return found


def kept(samples: Statistics, reference: Statistics) -> int:
    """How many generated, and as many real, images KID, precision and recall are computed from."""
    return min(len(samples.features), len(reference.features))


def _distance(name: str, one: Moments, two: Moments) -> float:
    mu_1, sigma_1, mu_2, sigma_2 = (
        tensor.cpu().numpy() for each in (one, two) for tensor in (each.mean, each.covariance)
    )
    if name == "clean_fid":  # by its own formula too: it checks the other
        return float(clean_fid().frechet_distance(mu_1, sigma_1, mu_2, sigma_2))
    metric_fid = torch_fidelity().metric_fid
    statistics = {"mu": mu_1, "sigma": sigma_1}, {"mu": mu_2, "sigma": sigma_2}
    return float(metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID])
