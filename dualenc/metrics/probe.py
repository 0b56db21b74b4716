"""Probes of frozen embeddings: what a simple classifier learns from them.

Each probe chooses one number by accuracy on images held out, learns again from all there is, and is tested once. The
embeddings are used as given, neither standardised nor brought to unit length.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dualenc.metrics.classification import block_rows, classification_items, classification_scores
from dualenc.metrics.ranking import nearest
from dualenc.metrics.retrieval import Scores

TEMPERATURE = 0.07  # of the votes
NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
GRADIENT, ITERATIONS = 1e-7, 1000  # where a fit has converged, and where it ends if it has not

Labelled = tuple[Tensor, Tensor]  # embeddings (N, E), class of each (N,)


class Probe(NamedTuple):
    """What a probe found."""

    scores: Scores
    chosen: dict[str, float]
    held: dict[str, float]  # accuracy on the images held out, by the numbers tried
    missing: list[int]  # classes without an image to learn from, which are never answered


class Logistic(NamedTuple):
    """A multinomial logistic regression."""

    weight: Tensor  # (K, E) float64
    bias: Tensor  # (K,)
    classes: Tensor  # (K,) their numbers
    gradient: float  # at the end, see `linear_probe`


def linear_probe(
    train: Tensor,
    train_targets: Tensor,
    test: Tensor,
    test_targets: Tensor,
    *,
    held: Labelled | None = None,
    seed: int = 0,
    replicates: int = 1000,
) -> Probe:
    """Logistic regression on embeddings, as in CLIP (Radford et al. 2021, section 3.2 and A.3).

    C of `logistic_regression` is searched between 1e-6 and 1e6: seven values two decades apart, then around the best
    at a distance of 1, 1/2, 1/4 and 1/8 of a decade. Of equally good ones the smallest is taken.

    Args:
        train: (N, E).
        train_targets: (N,) class of each.
        test: (M, E).
        test_targets: (M,).
        held: embeddings and classes by which to choose; absent, a fifth of `train`, as evenly of its classes as can be.
        seed: of the draw of this fifth.
        replicates: bootstrap samples; 0 for no intervals.

    Returns:
        The metrics of `classification_metrics` over the classes 0 to the largest that occurs. Chosen are `C` and, of
        the last fit, the `gradient`: the largest entry in size of the mean objective's, in coordinates in which the
        data has unit variance. A fit ends below 1e-7, or unfinished after 1,000 iterations.

    Raises:
        ValueError: embeddings are not finite, embeddings and classes differ in number, or nothing can be held out.
    """
    data = _split(train, train_targets, test, test_targets, held, seed)
    accuracy: dict[int, float] = {}  # by the logarithm of C, in eighths of a decade
    peak = 0
    for around in (range(-48, 49, 16), *((-step, step) for step in (8, 4, 2, 1))):
        for place in (peak + step for step in around):
            if abs(place) <= 48 and place not in accuracy:
                fit = logistic_regression(*data.learn, 10 ** (place / 8))
                accuracy[place] = _accuracy(_logits(fit, data.held[0], data.classes), data.held[1], data.classes)
        peak = min(accuracy, key=lambda place: (-accuracy[place], place))
    final = logistic_regression(*data.all, 10 ** (peak / 8))
    items = classification_items(_logits(final, test, data.classes), test_targets, data.classes)
    chosen = {"C": 10 ** (peak / 8), "gradient": final.gradient}
    found = {f"{10 ** (place / 8):.3g}": accuracy[place] for place in sorted(accuracy)}
    return Probe(classification_scores(items, replicates=replicates), chosen, found, data.missing)


def logistic_regression(x: Tensor, targets: Tensor, c: float) -> Logistic:
    """Weights W and biases b that minimise C * (sum of the cross entropies) + |W|^2 / 2, by L-BFGS in float64.

    The objective is scikit-learn's, but two classes are no exception here: they have a row of W each, where
    scikit-learn has only the difference of the rows and finds the same at twice the C.

    Args:
        x: (N, E).
        targets: (N,) classes, any numbers.
        c: inverse strength of the regularization.
    """
    classes, labels = targets.unique(return_inverse=True)
    # The same problem in other coordinates, in which its curvature at zero is the same all around: L-BFGS then takes a
    # fraction of the steps. Biases are free, so the mean can go; a rotation leaves |W| as it is.
    center = x.double().mean(0)
    spread, axes = torch.linalg.eigh((x.double() - center).T @ (x.double() - center) / len(x))
    unit = (spread.clamp(min=0) + len(classes) / (c * len(x))).rsqrt()  # (E,)
    inputs = torch.cat([(x.double() - center) @ (axes * unit), x.new_ones(len(x), 1, dtype=torch.float64)], 1)
    rows = block_rows(len(classes))
    blocks = list(zip(inputs.split(rows), labels[:, None].split(rows)))
    ridge = torch.cat([unit.square(), unit.new_zeros(1)]) / (c * len(x))  # (E + 1,)
    solution = inputs.new_zeros(len(classes), inputs.shape[1])  # biases stand in the last column

    def objective() -> Tensor:  # over C N, with its gradient
        value = (ridge * solution.square()).sum() / 2
        gradient = ridge * solution
        for part, label in blocks:
            logits = part @ solution.T
            norm = logits.logsumexp(1, keepdim=True)
            value = value + (norm - logits.gather(1, label)).sum() / len(x)
            error = (logits - norm).exp_()
            error.scatter_add_(1, label, -torch.ones_like(norm))
            gradient.addmm_(error.T, part, alpha=1 / len(x))
        solution.grad = gradient
        return value

    optimizer = torch.optim.LBFGS(
        [solution],
        max_iter=ITERATIONS,
        max_eval=2 * ITERATIONS,
        tolerance_grad=GRADIENT,
        tolerance_change=1e-15,
        history_size=20,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(objective)  # type: ignore[arg-type]
    objective()  # at the end; the optimizer leaves the gradient of the last point it tried
    assert solution.grad is not None
    weight, bias = solution[:, :-1] * unit @ axes.T, solution[:, -1]
    return Logistic(weight, bias - weight @ center, classes, solution.grad.abs().max().item())


def knn_probe(
    train: Tensor,
    train_targets: Tensor,
    test: Tensor,
    test_targets: Tensor,
    *,
    held: Labelled | None = None,
    seed: int = 0,
    replicates: int = 1000,
) -> Probe:
    """Vote of the k nearest neighbors, each with weight exp(similarity / 0.07) (Wu et al. 2018, section 3.4).

    The similarity is the product of two embeddings, the cosine where they have unit length. k is chosen from 1, 5, 10,
    20, 50, 100 and 200 as far as there are images; of equally good ones the largest is taken.

    Args:
        train: (N, E).
        train_targets: (N,) class of each.
        test: (M, E).
        test_targets: (M,).
        held: embeddings and classes by which to choose; absent, a fifth of `train`, as evenly of its classes as can be.
        seed: of the draw of this fifth.
        replicates: bootstrap samples; 0 for no intervals.

    Returns:
        The metrics of `classification_metrics` over the classes 0 to the largest that occurs, where a class scores by
        its votes, one without any ties with all others without any, and the confidence is the answer's share of the
        votes. Chosen is `k`.

    Raises:
        ValueError: embeddings are not finite, embeddings and classes differ in number, or nothing can be held out.
    """
    data = _split(train, train_targets, test, test_targets, held, seed)
    ks = [k for k in NEIGHBOURS if k <= len(data.learn[0])]
    near = nearest(data.held[0], data.learn[0], ks[-1])
    accuracy = {}
    for k in ks:
        accuracy[k] = _accuracy(_votes(*near, data.learn[1], k, data.classes), data.held[1], data.classes)
    k = max(ks, key=lambda k: (accuracy[k], k))
    votes = _votes(*nearest(test, data.all[0], k), data.all[1], k, data.classes)
    items = classification_items(votes, test_targets, data.classes)
    found = {str(k): accuracy[k] for k in ks}
    return Probe(classification_scores(items, replicates=replicates), {"k": k}, found, data.missing)


class _Split(NamedTuple):
    learn: Labelled
    held: Labelled
    all: Labelled  # both
    classes: int
    missing: list[int]


def _split(
    train: Tensor, train_targets: Tensor, test: Tensor, test_targets: Tensor, held: Labelled | None, seed: int
) -> _Split:
    given = {"train": (train, train_targets), "test": (test, test_targets)} | ({"held": held} if held else {})
    for name, (x, targets) in given.items():
        if not len(x) == len(targets) > 0:
            raise ValueError(f"{name} has {len(x)} embeddings and {len(targets)} classes")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} holds embeddings that are not finite")
        if int(targets.min()) < 0:
            raise ValueError(f"{name} holds a negative class")
    learn = everything = (train, train_targets.to(train.device))
    if held is None:
        out = _every_fifth(train_targets.cpu(), seed).to(train.device)
        learn, held = (train[~out], learn[1][~out]), (train[out], learn[1][out])
    else:
        everything = (torch.cat([train, held[0]]), torch.cat([learn[1], held[1].to(train.device)]))
    classes = 1 + max(int(targets.max()) for _, targets in given.values())
    known = torch.bincount(everything[1].cpu(), minlength=classes) > 0
    return _Split(learn, held, everything, classes, torch.nonzero(~known)[:, 0].tolist())


def _every_fifth(targets: Tensor, seed: int) -> Tensor:
    """Which images (N,) to hold out: a fifth of each class, up to rounding, and none that is alone in its class."""
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    ordered = shuffled[torch.argsort(targets[shuffled], stable=True)]
    ordered = ordered[torch.bincount(targets)[targets[ordered]] > 1]
    if not len(ordered):
        raise ValueError("no class has two images, one to learn from and one to hold out: give held-out data")
    out = torch.zeros(len(targets), dtype=torch.bool)
    out[ordered[::5]] = True
    return out


def _accuracy(blocks: Iterable[Tensor], targets: Tensor, classes: int) -> float:
    return (classification_items(blocks, targets, classes)["rank"] < 1).double().mean().item()


def _logits(fit: Logistic, x: Tensor, classes: int) -> Iterator[Tensor]:
    for part in x.split(block_rows(classes)):
        scores = fit.weight.new_full((len(part), classes), -torch.inf)
        scores[:, fit.classes] = part.to(fit.weight) @ fit.weight.T + fit.bias
        yield scores


def _votes(indices: Tensor, similarity: Tensor, targets: Tensor, k: int, classes: int) -> Iterator[Tensor]:
    """Logarithms of the votes for each class (n, C), from the neighbors (Q, k or more), the nearest first."""
    rows = block_rows(classes)
    for index, near in zip(indices[:, :k].split(rows), similarity[:, :k].split(rows)):
        weights = ((near - near[:, :1]) / TEMPERATURE).exp()  # over the nearest one's
        votes = weights.new_zeros(len(index), classes)
        yield votes.scatter_add_(1, targets.to(index.device)[index], weights).log()
