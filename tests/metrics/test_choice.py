from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from dualenc.metrics.choice import choice_bootstrap, choice_metrics


def unit(*shape):
    return F.normalize(torch.randn(*shape), dim=-1)


def by_definition(image, text, images_of, texts_of):
    """Compute the three outcomes of each instance, comparison by comparison (Thrush et al. 2022, equations 1 to 3)."""
    found = []
    for images, (c0, c1) in zip(images_of.tolist(), texts_of.tolist(), strict=True):

        def score(c, i):
            return sum(float(a) * float(b) for a, b in zip(text[c], image[i], strict=True))

        def above(a, b):  # A difference up to 1e-12 is a tie.
            return a - b > 1e-12

        i0 = images[0]
        if len(images) == 1:
            found.append([above(score(c0, i0), score(c1, i0))])
            continue
        i1 = images[1]
        text_score = above(score(c0, i0), score(c1, i0)) and above(score(c1, i1), score(c0, i1))
        image_score = above(score(c0, i0), score(c0, i1)) and above(score(c1, i1), score(c1, i0))
        found.append([text_score, image_score, text_score and image_score])
    return torch.tensor(found, dtype=torch.float64)


NAMES = ["text_score", "image_score", "group_score"]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("kind", ["random", "coarse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_definition(images, kind, dtype):
    """Instances share images and texts, in random order; coarse embeddings often tie."""
    image, text = unit(70, 6), unit(90, 6)
    if kind == "coarse":
        image, text = image.sign() / 2, text.sign() / 2
    image, text = image.to(dtype), text.to(dtype)
    images_of = torch.stack([torch.randperm(70)[:images] for _ in range(60)])
    texts_of = torch.stack([torch.randperm(90)[:2] for _ in range(60)])
    outcomes = by_definition(image, text, images_of, texts_of)
    names = NAMES if images == 2 else NAMES[:1]
    metrics, intervals, chance, items = choice_metrics(image, text, images_of, texts_of)
    assert list(metrics) == names
    assert list(metrics.values()) == pytest.approx(outcomes.mean(0).tolist(), abs=1e-12)
    assert set(intervals) == set(chance) == set(names)
    assert all(low <= metrics[name] <= high for name, (low, high) in intervals.items())
    assert (items["scores"].dtype, items["scores"].shape) == (torch.float64, (60, images, 2))
    measures = choice_bootstrap(items)
    assert measures.values() == metrics
    assert measures.intervals() == intervals
    weights = torch.randint(4, (3, 60)).double()
    for name, outcome in zip(names, outcomes.T, strict=True):
        expected = (weights * outcome).sum(1) / weights.sum(1)
        assert measures.statistics[name](weights).tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    without = choice_metrics(image, text, images_of, texts_of, replicates=0)
    assert (without.metrics, without.intervals) == (metrics, {})


def test_text_and_image_score_are_independent():
    """In one instance only the texts are matched correctly, in the other only the images."""
    image, text = torch.eye(4), torch.eye(4)
    text[0, 0] = 2.0  # text 0 is for image 0; image 1 scores it at 3, and its own text 1 at 4
    text[0, 1], text[1, 1], text[1, 0] = 3.0, 4.0, 1.0
    text[2, 2], text[2, 3], text[3, 3], text[3, 2] = 2.0, 1.0, 4.0, 3.0  # the same with images and texts exchanged
    measures = choice_metrics(image, text, torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [2, 3]]))
    assert measures.metrics == {"text_score": 0.5, "image_score": 0.5, "group_score": 0.0}


def test_a_collapsed_model_is_always_wrong():
    same = unit(1, 8).expand(6, -1)
    pairs = torch.arange(6).view(3, 2)
    assert set(choice_metrics(same, same, pairs, pairs).metrics.values()) == {0.0}
    assert choice_metrics(same, same, pairs[:, :1], pairs).metrics == {"text_score": 0.0}


def test_chance_is_the_mean_over_all_orders_of_the_scores():
    orders = list(permutations(range(4)))
    text = torch.tensor(orders, dtype=torch.float64).view(-1, 2, 2).flatten(0, 1)  # scores with images 0 and 1
    pairs = torch.arange(len(text)).view(-1, 2)
    metrics, _, chance, _ = choice_metrics(torch.eye(2), text, torch.tensor([[0, 1]] * len(pairs)), pairs)
    assert chance == pytest.approx(metrics, abs=1e-12)
    metrics, _, chance, _ = choice_metrics(torch.eye(2), text, torch.tensor([[0]] * len(pairs)), pairs)
    assert chance == pytest.approx(metrics, abs=1e-12)


def test_scores_that_differ_only_in_float64():
    image = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    text = torch.tensor([[1.0, 1e-10], [1.0, 0.0]], dtype=torch.float64) + 1  # equal as float32
    assert choice_metrics(image, text, torch.tensor([[0]]), torch.tensor([[0, 1]])).metrics == {"text_score": 1.0}
    assert choice_metrics(image, text, torch.tensor([[0]]), torch.tensor([[1, 0]])).metrics == {"text_score": 0.0}


@pytest.mark.parametrize(
    ("images_of", "texts_of", "cause"),
    [
        ([[0, 1, 2]], [[0, 1]], "1 or 2"),
        ([[0, 1]], [[0]], "1 or 2"),
        ([[0], [1]], [[0, 1]], "1 or 2"),
        ([[0, 3]], [[0, 1]], "images_of must be numbers between 0 and 2"),
        ([[0, -1]], [[0, 1]], "images_of must"),
        ([[0, 1]], [[0, 4]], "texts_of must be numbers between 0 and 3"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(images_of, texts_of, cause):
    with pytest.raises(ValueError, match=cause):
        choice_metrics(unit(3, 5), unit(4, 5), torch.tensor(images_of), torch.tensor(texts_of))


@pytest.mark.parametrize("which", ["images", "texts"])
def test_non_finite_embeddings_are_refused(which):
    image, text = unit(3, 5), unit(4, 5)
    (image if which == "images" else text)[2, 1] = float("nan")
    with pytest.raises(ValueError, match=f"the {which} hold"):
        choice_metrics(image, text, torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
