"""Probes of frozen embeddings: simple classifiers that are trained on them.

A probe of all images chooses one hyperparameter by the accuracy on held-out images, is trained again on all images, and
is tested once. A probe of a few images of each class is trained several times, on other images each time. The
embeddings are used as given, neither standardized nor normalized to unit length.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dualenc.metrics.classification import block_rows, classification_items, classification_scores
from dualenc.metrics.ranking import nearest
from dualenc.metrics.retrieval import Scores

TEMPERATURE = 0.07  # of the votes
NEIGHBORS = (1, 5, 10, 20, 50, 100, 200)  # values of k to choose from
GRADIENT, ITERATIONS = 1e-7, 1000  # the gradient at which a fit has converged, and the limit of its iterations

FEW_SHOT_C = 1.0  # scikit-learn's default: to choose another one would need more labels than the shots

Labeled = tuple[Tensor, Tensor]  # embeddings (N, E), class of each (N,)


class Probe(NamedTuple):
    """The result of a probe."""

    scores: Scores
    chosen: dict[str, float]
    held_out_accuracy: dict[str, float]  # accuracy on the held-out images for each value that was tried
    missing: list[int]  # classes without a training image, which are never predicted


class FewShot(NamedTuple):
    """The result of `few_shot_probe` for one number of images of each class."""

    right: Tensor  # (D, M) bool, whether the probe of each draw is right on each image
    interval: tuple[float, float] | None  # 95% interval of the mean accuracy; None for a single draw
    fewer: list[int]  # classes with fewer images to learn from than were asked for


class LogisticRegression(NamedTuple):
    """A fitted multinomial logistic regression."""

    weight: Tensor  # (K, E) float64
    bias: Tensor  # (K,)
    classes: Tensor  # (K,) numbers of the classes
    gradient: float  # largest entry of the final gradient; see `linear_probe`


def linear_probe(
    train: Tensor,
    train_targets: Tensor,
    test: Tensor,
    test_targets: Tensor,
    *,
    held_out: Labeled | None = None,
    seed: int = 0,
    replicates: int = 1000,
) -> Probe:
    """Train and test a logistic regression on embeddings, as in CLIP (Radford et al. 2021, section 3.2 and A.3).

    C of `logistic_regression` is searched between 1e-6 and 1e6: first seven values two decades apart, then values at
    a distance of 1, 1/2, 1/4 and 1/8 of a decade from the best. Among equally good values the smallest is chosen.

    Args:
        train: (N, E) embeddings.
        train_targets: (N,) class of each.
        test: (M, E) embeddings.
        test_targets: (M,) class of each.
        held_out: embeddings and classes to choose C by; absent, a fifth of each class of `train`.
        seed: seed of the draw of this fifth.
        replicates: number of bootstrap samples; 0 for no intervals.

    Returns:
        The metrics of `classification_metrics` over the classes 0 to the largest that occurs. `chosen` holds `C` and
        the `gradient` of the last fit: the largest absolute entry of the gradient of the mean objective, in coordinates
        in which the data has unit variance. A fit ends below 1e-7, or unfinished after 1,000 iterations.

    Raises:
        ValueError: If embeddings are not finite, embeddings and classes differ in number, or no image can be held out.
    """
    data = _split(train, train_targets, test, test_targets, held_out, seed)
    accuracy: dict[int, float] = {}  # by the logarithm of C, in eighths of a decade
    best = 0
    for steps in (range(-48, 49, 16), *((-step, step) for step in (8, 4, 2, 1))):
        for exponent in (best + step for step in steps):
            if abs(exponent) <= 48 and exponent not in accuracy:
                fit = logistic_regression(*data.train, 10 ** (exponent / 8))
                logits = _logits(fit, data.held_out[0], data.classes)
                accuracy[exponent] = _accuracy(logits, data.held_out[1], data.classes)
        best = min(accuracy, key=lambda exponent: (-accuracy[exponent], exponent))
    final = logistic_regression(*data.all, 10 ** (best / 8))
    items = classification_items(_logits(final, test, data.classes), test_targets, data.classes)
    chosen = {"C": 10 ** (best / 8), "gradient": final.gradient}
    tried = {f"{10 ** (exponent / 8):.3g}": accuracy[exponent] for exponent in sorted(accuracy)}
    return Probe(classification_scores(items, replicates=replicates), chosen, tried, data.missing)


def logistic_regression(x: Tensor, targets: Tensor, c: float) -> LogisticRegression:
    """Fit weights W and biases b that minimize C * (sum of the cross entropies) + |W|^2 / 2, by L-BFGS in float64.

    The objective is scikit-learn's. For two classes scikit-learn fits only the difference of the two rows of W, which
    gives the same result at twice the C.

    Args:
        x: (N, E) embeddings.
        targets: (N,) classes, any numbers.
        c: inverse strength of the regularization.
    """
    classes, labels = targets.unique(return_inverse=True)
    # The problem is solved in coordinates in which its curvature at zero is equal in all directions, where L-BFGS needs
    # a fraction of the steps. The biases are not regularized, so the mean can be subtracted; a rotation preserves |W|.
    center = x.double().mean(0)
    variance, axes = torch.linalg.eigh((x.double() - center).T @ (x.double() - center) / len(x))
    unit = (variance.clamp(min=0) + len(classes) / (c * len(x))).rsqrt()  # (E,)
    inputs = torch.cat([(x.double() - center) @ (axes * unit), x.new_ones(len(x), 1, dtype=torch.float64)], 1)
    rows = block_rows(len(classes))
    blocks = list(zip(inputs.split(rows), labels[:, None].split(rows)))
    ridge = torch.cat([unit.square(), unit.new_zeros(1)]) / (c * len(x))  # (E + 1,)
    solution = inputs.new_zeros(len(classes), inputs.shape[1])  # The last column holds the biases.

    def objective() -> Tensor:  # divided by C N; also stores its gradient
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
    objective()  # The optimizer leaves the gradient of the last point it tried, not of the solution.
    assert solution.grad is not None
    weight, bias = solution[:, :-1] * unit @ axes.T, solution[:, -1]
    return LogisticRegression(weight, bias - weight @ center, classes, solution.grad.abs().max().item())


def knn_probe(
    train: Tensor,
    train_targets: Tensor,
    test: Tensor,
    test_targets: Tensor,
    *,
    held_out: Labeled | None = None,
    seed: int = 0,
    replicates: int = 1000,
) -> Probe:
    """Train and test a vote of the k nearest neighbors (Wu et al. 2018, section 3.4).

    Each neighbor votes with weight exp(similarity / 0.07). The similarity is the product of two embeddings, which is
    the cosine at unit length. k is chosen from 1, 5, 10, 20, 50, 100 and 200, up to the number of images. Among equally
    good values the largest is chosen.

    Args:
        train: (N, E) embeddings.
        train_targets: (N,) class of each.
        test: (M, E) embeddings.
        test_targets: (M,) class of each.
        held_out: embeddings and classes to choose k by; absent, a fifth of each class of `train`.
        seed: seed of the draw of this fifth.
        replicates: number of bootstrap samples; 0 for no intervals.

    Returns:
        The metrics of `classification_metrics` over the classes 0 to the largest that occurs. The score of a class is
        its votes; classes without votes tie. The confidence is the answer's share of the votes. `chosen` holds `k`.

    Raises:
        ValueError: If embeddings are not finite, embeddings and classes differ in number, or no image can be held out.
    """
    data = _split(train, train_targets, test, test_targets, held_out, seed)
    ks = [k for k in NEIGHBORS if k <= len(data.train[0])]
    neighbors = nearest(data.held_out[0], data.train[0], ks[-1])
    accuracy = {}
    for k in ks:
        votes = _votes(*neighbors, data.train[1], k, data.classes)
        accuracy[k] = _accuracy(votes, data.held_out[1], data.classes)
    k = max(ks, key=lambda k: (accuracy[k], k))
    votes = _votes(*nearest(test, data.all[0], k), data.all[1], k, data.classes)
    items = classification_items(votes, test_targets, data.classes)
    tried = {str(k): accuracy[k] for k in ks}
    return Probe(classification_scores(items, replicates=replicates), {"k": k}, tried, data.missing)


def few_shot_probe(
    train: Tensor,
    train_targets: Tensor,
    test: Tensor,
    test_targets: Tensor,
    *,
    shots: Sequence[int],
    draws: int = 5,
    seed: int = 0,
) -> dict[int, FewShot]:
    """Train and test logistic regressions on a few images of each class, several times with other images.

    C of `logistic_regression` is `FEW_SHOT_C`. The images of a draw for a smaller number are among those for a larger
    one, and the draws depend on the order and the classes of the images only, so that they are the same for two models.

    The interval holds for other draws and other test images of the same classes. Its variance is that of the draws and
    that of the test images within their classes, each counted once (Owen 2007, The pigeonhole bootstrap). Its width
    follows Student's distribution with the degrees of freedom of the sum (Satterthwaite 1946).

    Args:
        train: (N, E) embeddings.
        train_targets: (N,) class of each.
        test: (M, E) embeddings.
        test_targets: (M,) class of each.
        shots: numbers of images of each class; of a class with fewer, all are used.
        draws: D, the number of draws for each of them.
        seed: seed of the draws.

    Returns:
        The outcome for each number of images.

    Raises:
        ValueError: If a number is not positive, embeddings are not finite, or embeddings and classes differ in number.
    """
    if draws < 1 or min(shots) < 1:
        raise ValueError(f"shots {min(shots)} and draws {draws} must be at least 1")
    _check({"train": (train, train_targets), "test": (test, test_targets)})
    targets, wanted = train_targets.cpu(), test_targets.cpu()
    classes = 1 + max(int(targets.max()), int(wanted.max()))
    sizes = torch.bincount(targets, minlength=classes)
    place = torch.arange(len(targets)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # of an image in its class
    generator = torch.Generator().manual_seed(seed)
    right: dict[int, list[Tensor]] = {k: [] for k in shots}
    for _ in range(draws):
        order = _by_class(targets, generator)
        for k in right:
            rows = order[place < k].to(train.device)
            fit = logistic_regression(train[rows], train_targets[rows], FEW_SHOT_C)
            ranks = classification_items(_logits(fit, test, classes), test_targets, classes)["rank"]
            right[k].append(ranks < 1)
    return {
        k: FewShot(torch.stack(parts), _interval(torch.stack(parts), wanted), torch.nonzero(sizes < k)[:, 0].tolist())
        for k, parts in right.items()
    }


def _interval(right: Tensor, targets: Tensor) -> tuple[float, float] | None:
    """Return the interval of `few_shot_probe` for the outcomes (D, M); None for a single draw."""
    draws, images = right.shape
    if draws < 2:
        return None
    share = right.double().mean(0)  # (M,)
    parts = [share[targets == c] for c in targets.unique()]
    of_images = sum(len(part) * part.var().item() for part in parts if len(part) > 1) / images**2
    of_draws = right.double().mean(1).var().item() / draws
    both = right.double().var(0).mean().item() / (draws * images)  # of single answers, which is in either variance
    variance = max(of_draws + of_images - both, of_draws, of_images)
    freedom = variance**2 / max(of_draws**2 / (draws - 1) + of_images**2 / images, 1e-300)
    half = student_quantile(max(draws - 1, int(freedom))) * variance**0.5
    middle = share.mean().item()
    return max(0.0, middle - half), min(1.0, middle + half)


def student_quantile(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t distribution, to 1%.

    Args:
        freedom: degrees of freedom; above two the series of Abramowitz and Stegun (1964, 26.7.5) is used.
    """
    z = 1.959964
    series = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return {1: 12.7062, 2: 4.3027}.get(freedom) or sum(term / freedom**i for i, term in enumerate(series))


class _Split(NamedTuple):
    train: Labeled
    held_out: Labeled
    all: Labeled  # both together
    classes: int
    missing: list[int]


def _split(
    train: Tensor, train_targets: Tensor, test: Tensor, test_targets: Tensor, held_out: Labeled | None, seed: int
) -> _Split:
    """Check the data, and hold out images of the training set if none are given."""
    given = {"train": (train, train_targets), "test": (test, test_targets)}
    given |= {"held_out": held_out} if held_out else {}
    _check(given)
    fit_on = everything = (train, train_targets.to(train.device))
    if held_out is None:
        out = every_fifth(train_targets.cpu(), seed).to(train.device)
        fit_on, held_out = (train[~out], fit_on[1][~out]), (train[out], fit_on[1][out])
    else:
        everything = (torch.cat([train, held_out[0]]), torch.cat([fit_on[1], held_out[1].to(train.device)]))
    classes = 1 + max(int(targets.max()) for _, targets in given.values())
    known = torch.bincount(everything[1].cpu(), minlength=classes) > 0
    return _Split(fit_on, held_out, everything, classes, torch.nonzero(~known)[:, 0].tolist())


def _check(given: Mapping[str, Labeled]) -> None:
    """Check embeddings and their classes, by name."""
    for name, (x, targets) in given.items():
        if not len(x) == len(targets) > 0:
            raise ValueError(f"{name} has {len(x)} embeddings and {len(targets)} classes")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} holds embeddings that are not finite")
        if int(targets.min()) < 0:
            raise ValueError(f"{name} holds a negative class")


def _by_class(targets: Tensor, generator: torch.Generator) -> Tensor:
    """Return the numbers of the images (N,) class by class, in random order within each class."""
    shuffled = torch.randperm(len(targets), generator=generator)
    return shuffled[torch.argsort(targets[shuffled], stable=True)]


def every_fifth(targets: Tensor, seed: int) -> Tensor:
    """Draw images to hold out, as a mask (N,): a fifth of each class, rounded, and no image alone in its class.

    Args:
        targets: (N,) class of each image.
        seed: seed of the draw.

    Raises:
        ValueError: If no class has two images.
    """
    ordered = _by_class(targets, torch.Generator().manual_seed(seed))
    ordered = ordered[torch.bincount(targets)[targets[ordered]] > 1]
    if not len(ordered):
        raise ValueError("no class has two images, one to train on and one to hold out: give held-out data")
    out = torch.zeros(len(targets), dtype=torch.bool)
    out[ordered[::5]] = True
    return out


def _accuracy(blocks: Iterable[Tensor], targets: Tensor, classes: int) -> float:
    return (classification_items(blocks, targets, classes)["rank"] < 1).double().mean().item()


def _logits(fit: LogisticRegression, x: Tensor, classes: int) -> Iterator[Tensor]:
    for part in x.split(block_rows(classes)):
        scores = fit.weight.new_full((len(part), classes), -torch.inf)
        scores[:, fit.classes] = part.to(fit.weight) @ fit.weight.T + fit.bias
        yield scores


def _votes(indices: Tensor, similarity: Tensor, targets: Tensor, k: int, classes: int) -> Iterator[Tensor]:
    """Yield the logarithms of the votes for each class, (n, C) for consecutive blocks of images.

    Args:
        indices: (Q, k or more) neighbors, the nearest first.
        similarity: their similarities.
        targets: class of each candidate.
        k: number of neighbors that vote.
        classes: C, the number of classes.
    """
    rows = block_rows(classes)
    for index, near in zip(indices[:, :k].split(rows), similarity[:, :k].split(rows)):
        weights = ((near - near[:, :1]) / TEMPERATURE).exp()  # divided by the weight of the nearest
        votes = weights.new_zeros(len(index), classes)
        yield votes.scatter_add_(1, targets.to(index.device)[index], weights).log()
