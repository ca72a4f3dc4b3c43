"""Measures how close generated images are to real ones: FID and related metrics, computed with torch-fidelity.

    d^2 = |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2))            (Heusel et al., arXiv 1706.08500, eq. 6)

is called FID only for the features of Inception-v3; for other features it is called `frechet_<extractor>`.
"""

from __future__ import annotations

import numpy as np

from lsgm.errors import LSGMError
from lsgm.evaluation.extractors import clean_fid, extractor, torch_fidelity
from lsgm.evaluation.statistics import Moments, Statistics

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3  # precision and recall: the k-th nearest neighbor sets the radius of each ball


def frechet_distance(one: Statistics, two: Statistics) -> float:
    """Squared Fréchet distance d^2, the number that is reported as FID.

    By convention ``two`` is the whole training set. Two finite sets from the same distribution have a distance above 0
    that falls with their size, so report the number of samples and :func:`real_vs_real` with it.
    Raises :class:`LSGMError` if the features come from different extractors.
    """
    if one.extractor != two.extractor:
        raise LSGMError(f"Fréchet distance: {one.extractor} features cannot be compared with {two.extractor} features")
    return _distance(one.extractor, one.moments, two.moments)


def real_vs_real(reference: Statistics, n: int, seed: int, repeats: int = 5) -> float:
    """The distance between two disjoint random sets of ``n`` real images, averaged over ``repeats`` draws.

    It is a baseline for the distance of generated images. A perfect model whose n samples are compared with far more
    than n real images scores about half of it, because only one of the two sets is then small.
    Raises :class:`LSGMError` if ``reference`` kept the features of fewer than 2 n images.
    """
    features = reference.features
    if len(features) < 2 * n:
        raise LSGMError(f"real_vs_real: two disjoint sets of {n} need {2 * n} real images, found {len(features)}")
    rng = np.random.default_rng(seed)
    draws = [np.split(rng.choice(len(features), 2 * n, replace=False), 2) for _ in range(repeats)]
    distances = [_distance(reference.extractor, *(Moments.of(features[half]) for half in pair)) for pair in draws]
    return float(np.mean(distances))


def metrics(samples: Statistics, reference: Statistics) -> dict[str, float]:
    """Compare generated with real images by all metrics of the extractor.

    - `fid`, `clean_fid` or `frechet_<extractor>` uses all images. The extractor `clean_fid` has no other metric.
    - `kid_<extractor>` with its standard deviation over subsets (Binkowski et al., arXiv 1801.01401),
      `precision_<extractor>` and `recall_<extractor>` (Kynkaanniemi et al., arXiv 1904.06991) use the kept features, of
      equally many generated and real images.
    - `inception_score` with its standard deviation over ten parts (Salimans et al., arXiv 1606.03498) needs logits.
    """
    name = samples.extractor
    found = {extractor(name).distance: frechet_distance(samples, reference)}
    if name == "clean_fid":
        return found
    library = torch_fidelity()
    n = kept(samples, reference)
    pair = samples.features[:n], reference.features[:n]  # generated first: the order tells precision from recall
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
    """The number of generated images, and of real images, that KID, precision and recall use."""
    return min(len(samples.features), len(reference.features))


def _distance(name: str, one: Moments, two: Moments) -> float:
    mu_1, sigma_1, mu_2, sigma_2 = (
        tensor.cpu().numpy() for each in (one, two) for tensor in (each.mean, each.covariance)
    )
    if name == "clean_fid":  # an independent implementation, as a cross-check
        return float(clean_fid().frechet_distance(mu_1, sigma_1, mu_2, sigma_2))
    metric_fid = torch_fidelity().metric_fid
    statistics = {"mu": mu_1, "sigma": sigma_1}, {"mu": mu_2, "sigma": sigma_2}
    return float(metric_fid.fid_statistics_to_metric(*statistics, verbose=False)[metric_fid.KEY_METRIC_FID])
