"""Clusters of embeddings, and how they agree with classes."""

import torch
from torch import Tensor

from dualenc.metrics.bootstrap import BootstrapMetrics
from dualenc.metrics.classification import block_rows

ITERATIONS = 300  # of k-means at most


def k_means(x: Tensor, k: int, *, restarts: int = 10, seed: int = 0) -> Tensor:
    """Group embeddings around k means with a small sum of squared distances, by Lloyd's algorithm in float64.

    It begins with means drawn by k-means++ (Arthur and Vassilvitskii 2007); the best of several such searches is kept.

    Args:
        x: (N, E) embeddings.
        k: number of clusters, at most N.
        restarts: number of searches.
        seed: seed of the draws.

    Returns:
        (N,) int64 cluster of each embedding, on the CPU.

    Raises:
        ValueError: If there are fewer embeddings than clusters, or they are not finite.

    Example:
        >>> import torch
        >>> from dualenc.metrics import k_means
        >>> cluster = k_means(torch.tensor([[0.0], [9.0], [0.1], [9.1]]), 2)
        >>> cluster[0] == cluster[2], cluster[1] == cluster[3], cluster[0] == cluster[1]
        (tensor(True), tensor(True), tensor(False))
    """
    x = x.detach().double().cpu()
    if not 1 <= k <= len(x) or not bool(torch.isfinite(x).all()):
        raise ValueError(f"{k} clusters need as many embeddings or more, all of them finite; found {len(x)}")
    x = x - x.mean(0)  # Distances stay, and their rounding errors become smaller.
    generator, best = torch.Generator().manual_seed(seed), None
    for _ in range(restarts):
        means = _spread_means(x, k, generator)
        cluster, distance = _nearest(x, means)
        for _ in range(ITERATIONS):
            sizes = torch.bincount(cluster, minlength=k)
            means = torch.zeros_like(means).index_add_(0, cluster, x) / sizes.clamp(min=1)[:, None]
            if empty := torch.nonzero(sizes == 0)[:, 0].tolist():  # An empty cluster begins again at a far embedding.
                means[empty] = x[distance.topk(len(empty)).indices]
            before = cluster
            cluster, distance = _nearest(x, means)
            if torch.equal(cluster, before):
                break
        if best is None or float(distance.sum()) < best[0]:
            best = float(distance.sum()), cluster
    assert best is not None
    return best[1]


def _spread_means(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Draw means (k, E) among the embeddings, each with a probability proportional to its squared distance."""
    means = [x[torch.randint(len(x), (), generator=generator)]]
    distance = (x - means[0]).square().sum(1)
    for _ in range(k - 1):
        # Embeddings that equal a mean have weight zero; if all do, any is drawn.
        weights = distance if float(distance.sum()) > 0 else torch.ones_like(distance)
        place = torch.rand((), generator=generator, dtype=torch.float64) * weights.sum()
        means.append(x[int(torch.searchsorted(weights.cumsum(0), place).clamp(max=len(x) - 1))])
        distance = torch.minimum(distance, (x - means[-1]).square().sum(1))
    return torch.stack(means)


def _nearest(x: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest mean of each embedding (N,), and its squared distance (N,)."""
    parts = []
    for rows in x.split(block_rows(len(means))):
        distances = rows.square().sum(1, keepdim=True) - 2 * rows @ means.T + means.square().sum(1)
        parts.append(distances.min(1))
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts]).clamp(min=0)


def cluster_bootstrap(clusters: Tensor, targets: Tensor) -> BootstrapMetrics:
    """Return how clusters agree with classes, as functions of the weights of what is clustered.

    - `purity`: share that belongs to the most frequent class of its cluster (Manning et al. 2008, section 16.3).
    - `v_measure`: harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg 2007), 1 if there is one
      cluster and one class.

    Args:
        clusters: (N,) int64.
        targets: (N,) int64 classes.

    Example:
        >>> import torch
        >>> from dualenc.metrics import cluster_bootstrap
        >>> found = cluster_bootstrap(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 1, 1])).values()
        >>> {name: round(value, 3) for name, value in found.items()}
        {'purity': 0.75, 'v_measure': 0.344}
    """
    pairs, cell = torch.stack([clusters, targets]).unique(dim=1, return_inverse=True)
    counts = [1 + int(labels.max()) for labels in pairs]

    def cells(weights: Tensor) -> Tensor:
        """Return the share of each pair of a cluster and a class (R, cells)."""
        sums = weights.new_zeros(len(weights), pairs.shape[1]).index_add_(1, cell, weights)
        return sums / weights.sum(1, keepdim=True)

    def purity(weights: Tensor) -> Tensor:
        share = cells(weights)
        largest = weights.new_zeros(len(weights), counts[0])
        return largest.scatter_reduce(1, pairs[0].expand_as(share), share, "amax").sum(1)

    def v_measure(weights: Tensor) -> Tensor:
        share = cells(weights)
        of_clusters, of_classes = (
            _entropy(weights.new_zeros(len(weights), count).index_add_(1, labels, share))
            for labels, count in zip(pairs, counts)
        )
        both = of_clusters + of_classes
        common = both - _entropy(share)  # the mutual information
        return torch.where(both > 1e-12, 2 * common / both.clamp(min=1e-12), 1.0).clamp(0, 1)

    return BootstrapMetrics({"purity": purity, "v_measure": v_measure}, len(clusters))


def _entropy(share: Tensor) -> Tensor:
    """Return the entropy (R,) of shares (R, n)."""
    return torch.special.entr(share).sum(1)
