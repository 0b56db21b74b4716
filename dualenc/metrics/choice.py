"""Metrics of compositional choice, in which texts of almost the same words must be matched with the right images."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dualenc.metrics.bootstrap import BootstrapMetrics, mean
from dualenc.metrics.ranking import TIE
from dualenc.metrics.retrieval import Scores

# Number of images -> expected metrics of scores in random order. A text score of two images needs two comparisons of
# separate scores to be right, 1/2 * 1/2. A group score needs two of four scores to be the two largest, 2! * 2! / 4!.
CHANCE = {1: {"text_score": 1 / 2}, 2: {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}}


def choice_metrics(
    image: Tensor, text: Tensor, images_of: Tensor, texts_of: Tensor, *, replicates: int = 1000
) -> Scores:
    """Compute the metrics of a set of choices, with 95% bootstrap intervals over its instances.

    Args:
        image: (I, E) embeddings.
        text: (T, E) embeddings.
        images_of: (n, 2) or (n, 1) numbers of each instance's images.
        texts_of: (n, 2) numbers of each instance's texts. Text j belongs to image j; with one image, text 1 belongs to
            no image.
        replicates: number of bootstrap samples; 0 for no intervals.

    Returns:
        The metrics of `choice_bootstrap`. Chance is that of a random order of an instance's scores. The item is
        `scores` (n, 1 or 2 images, 2 texts) float64.

    Raises:
        ValueError: If embeddings are not finite, or the numbers do not fit.
    """
    for name, x in (("images", image), ("texts", text)):
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"the {name} hold embeddings that are not finite: check the weights of the model")
    if len(images_of) != len(texts_of) or images_of.shape[1:] not in ((1,), (2,)) or texts_of.shape[1:] != (2,):
        raise ValueError(
            f"images_of {tuple(images_of.shape)} and texts_of {tuple(texts_of.shape)} must be (n, 1 or 2) and (n, 2)"
        )
    for name, numbers, count in (("images_of", images_of, len(image)), ("texts_of", texts_of, len(text))):
        if not bool(((numbers >= 0) & (numbers < count)).all()):
            raise ValueError(f"{name} must be numbers between 0 and {count - 1}")
    images, texts = image[images_of.to(image.device)].double(), text[texts_of.to(text.device)].double()
    items = {"scores": (images[:, :, None] * texts[:, None]).sum(-1).cpu()}  # (n, images, texts)
    bootstrap = choice_bootstrap(items)
    chance = dict(CHANCE[images_of.shape[1]])
    return Scores(bootstrap.values(), bootstrap.intervals(replicates=replicates), chance, items)


def choice_bootstrap(items: Mapping[str, Tensor]) -> BootstrapMetrics:
    """Return the metrics of choices as functions of the instances' weights (Winoground, Thrush et al. 2022, section 4).

    Args:
        items: items of `choice_metrics`.

    Returns:
        The metrics, in which a tie is wrong:

        - `text_score`: share of instances in which, for each image, the right text scores higher than the other. With
          one image it is the only metric, SugarCrepe's accuracy (Hsieh et al. 2023).
        - `image_score`: share of instances in which, for each text, the right image scores higher than the other.
        - `group_score`: share of instances in which both are true.
    """
    scores = items["scores"]
    right = scores.diagonal(dim1=1, dim2=2)  # (n, images)
    right_texts = (right > scores.flip(2).diagonal(dim1=1, dim2=2) + TIE).all(1)
    if scores.shape[1] == 1:
        return BootstrapMetrics({"text_score": mean(right_texts)}, len(scores))
    right_images = (right > scores.flip(1).diagonal(dim1=1, dim2=2) + TIE).all(1)
    statistics = {
        "text_score": mean(right_texts),
        "image_score": mean(right_images),
        "group_score": mean(right_texts & right_images),
    }
    return BootstrapMetrics(statistics, len(scores))
