"""k-means and the agreement of clusters with classes, compared with scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import v_measure_score
from sklearn.metrics.cluster import contingency_matrix

from dualenc.metrics import cluster_bootstrap, k_means


@pytest.mark.parametrize(("clusters", "classes"), [(4, 3), (1, 3), (3, 1), (1, 1), (30, 30)])
def test_agreement_equals_scikit_learn(seed: int, clusters: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.integers(clusters, size=60), rng.integers(classes, size=60)
    found = cluster_bootstrap(torch.from_numpy(one), torch.from_numpy(other))
    table = contingency_matrix(other, one)
    assert found.values() == pytest.approx(
        {"purity": table.max(0).sum() / 60, "v_measure": v_measure_score(other, one)}
    )
    weights = rng.integers(0, 3, (4, 60))  # a weight is a number of copies
    for row, *values in zip(weights, *(f(torch.from_numpy(weights).double()) for f in found.statistics.values())):
        a, b = one.repeat(row), other.repeat(row)
        expected = contingency_matrix(b, a).max(0).sum() / len(a), v_measure_score(b, a)
        assert [x.item() for x in values] == pytest.approx(expected)


def test_clusters_are_as_dense_as_those_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(120, 5)) + 3 * rng.normal(size=(6, 5))[rng.integers(6, size=120)] + 100
    found = k_means(torch.from_numpy(x), 6).numpy()
    spread = sum(((x[found == c] - x[found == c].mean(0)) ** 2).sum() for c in range(6))
    peer = KMeans(6, n_init=10, random_state=0).fit(x)
    assert spread <= 1.1 * peer.inertia_
    # Every embedding is with its nearest mean, which a random assignment is not.
    means = np.stack([x[found == c].mean(0) for c in range(6)])
    assert (((x[:, None] - means) ** 2).sum(2).argmin(1) == found).all()


def test_clouds_far_apart_are_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets = np.r_[np.arange(5), rng.integers(5, size=70)]
    x = torch.from_numpy(50 * np.eye(5)[targets] + rng.normal(size=(75, 5)))
    found = cluster_bootstrap(k_means(x, 5), torch.from_numpy(targets)).values()
    assert found == pytest.approx({"purity": 1, "v_measure": 1})
    assert torch.equal(k_means(x, 5), k_means(x, 5))


def test_equal_embeddings_are_one_cluster_and_too_few_are_refused() -> None:
    assert len(k_means(torch.ones(5, 2), 3).unique()) == 1
    with pytest.raises(ValueError, match="3 clusters need"):
        k_means(torch.ones(2, 2), 3)
