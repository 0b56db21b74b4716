"""Compositional choice: texts of the same words, or nearly so, and the images that tell them apart."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dualenc.metrics.bootstrap import BootstrapMetrics, mean
from dualenc.metrics.ranking import TIE
from dualenc.metrics.retrieval import Scores

CHANCE = {1: {"text_score": 1 / 2}, 2: {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}}


def choice_metrics(
    image: Tensor, text: Tensor, images_of: Tensor, texts_of: Tensor, *, replicates: int = 1000
) -> Scores:
    """Metrics of a set of choices, with 95% bootstrap intervals over its instances.

    Args:
        image: (I, E).
        text: (T, E).
        images_of: (n, 2) numbers of each instance's images, or (n, 1).
        texts_of: (n, 2) numbers of its texts. Text j belongs to image j; with one image, text 1 belongs to none.
        replicates: bootstrap samples; 0 for no intervals.

    Returns:
        The metrics of `choice_bootstrap`, by chance those of an order of an instance's scores drawn at random. The item
        is `scores` (n, 1 or 2 images, 2 texts) float64.

    Raises:
        ValueError: embeddings are not finite, or the numbers do not fit.
    """
    for name, x in (("images", image), ("texts", text)):
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"the {name} hold embeddings that are not finite: they cannot be compared")
    if len(images_of) != len(texts_of) or images_of.shape[1:] not in ((1,), (2,)) or texts_of.shape[1:] != (2,):
        raise ValueError(
            f"images_of {tuple(images_of.shape)} and texts_of {tuple(texts_of.shape)} must be (n, 1 or 2) and (n, 2)"
        )
    for name, x, number in (("images_of", images_of, len(image)), ("texts_of", texts_of, len(text))):
        if not bool(((x >= 0) & (x < number)).all()):
            raise ValueError(f"{name} must be numbers between 0 and {number - 1}")
    own, theirs = image[images_of.to(image.device)].double(), text[texts_of.to(text.device)].double()
    items = {"scores": (own[:, :, None] * theirs[:, None]).sum(-1).cpu()}  # (n, images, texts)
    bootstrap = choice_bootstrap(items)
    chance = dict(CHANCE[images_of.shape[1]])
    return Scores(bootstrap.values(), bootstrap.intervals(replicates=replicates), chance, items)


def choice_bootstrap(items: Mapping[str, Tensor]) -> BootstrapMetrics:
    """Metrics of choices as functions of the instances' weights (Winoground, Thrush et al. 2022, section 4).

    Args:
        items: of `choice_metrics`.

    Returns:
        `text_score`: share of instances in which, for each image, the right text scores higher. `image_score`: for each
        text, the right image. `group_score`: both. A tie is wrong. Instances of one image have `text_score` alone,
        which is SugarCrepe's accuracy (Hsieh et al. 2023).
    """
    scores = items["scores"]
    right = scores.diagonal(dim1=1, dim2=2)  # (n, images)
    images = scores.shape[1]
    texts = (right > scores.flip(2).diagonal(dim1=1, dim2=2) + TIE).all(1)
    if images == 1:
        return BootstrapMetrics({"text_score": mean(texts)}, len(scores))
    pictures = (right > scores.flip(1).diagonal(dim1=1, dim2=2) + TIE).all(1)
    statistics = {"text_score": mean(texts), "image_score": mean(pictures), "group_score": mean(texts & pictures)}
    return BootstrapMetrics(statistics, len(scores))
