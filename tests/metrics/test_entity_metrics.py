"""Metrics of named entities, equal to those of seqeval to the last digit."""

import random
import warnings

import pytest
import torch
from seqeval.metrics import accuracy_score, classification_report, f1_score, precision_score, recall_score
from seqeval.scheme import IOB1, IOB2, IOBES

from dualenc.metrics import entity_bootstrap, entity_metrics, outside_baseline, type_scores
from dualenc.utils.tags import SCHEMES, SchemeName

PEERS = {"iob1": IOB1, "iob2": IOB2, "bioes": IOBES}
Tags = list[list[str]]


def draw(scheme: str, texts: int, right: float) -> tuple[Tags, Tags]:
    """Draw tags of texts, valid and others, and predictions of which a share is copied."""
    names = SCHEMES[scheme].tags(random.sample(["PER", "LOC", "a-b", "ORG", "x"], random.randint(1, 5)))
    truth = [random.choices(names, k=random.randint(1, 12)) for _ in range(texts)]
    return truth, [[tag if random.random() < right else random.choice(names) for tag in tags] for tags in truth]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_metrics_equal_seqeval(scheme: SchemeName, seed: int) -> None:
    warnings.simplefilter("ignore")  # of ratios without a denominator
    for i in range(60):
        truth, predicted = draw(scheme, random.choice([1, 2, 30]), random.random())
        if i % 10 == 0:
            predicted = [["O"] * len(tags) for tags in predicted]
        found = entity_metrics(truth, predicted, scheme)
        assert found == {
            "f1": f1_score(truth, predicted),
            "precision": precision_score(truth, predicted),
            "recall": recall_score(truth, predicted),
            "f1_macro": f1_score(truth, predicted, average="macro")
            if {tag for tags in truth + predicted for tag in tags} - {"O"}
            else 0.0,
            "f1_strict": f1_score(truth, predicted, mode="strict", scheme=PEERS[scheme]),
            "accuracy": accuracy_score(truth, predicted),
        }
        report = classification_report(truth, predicted, output_dict=True)
        each = {key: value for key, value in report.items() if not key.endswith(" avg")}
        assert {key: list(x)[:4] for key, x in type_scores(truth, predicted).items()} == {
            key: [x["precision"], x["recall"], x["f1-score"], x["support"]] for key, x in each.items()
        }


def test_samples_of_texts(seed: int) -> None:
    """Check that a text of weight two counts as if it were there twice."""
    truth, predicted = draw("iob2", 40, 0.8)
    bootstrap = entity_bootstrap(truth, predicted, "iob2")
    measured = entity_metrics(truth, predicted, "iob2")
    assert bootstrap.values() == pytest.approx(measured, abs=1e-12)
    weights = torch.randint(0, 4, (len(truth),))
    both = [[tags for tags, n in zip(own, weights.tolist()) for _ in range(n)] for own in (truth, predicted)]
    again = {name: float(one(weights[None].double())) for name, one in bootstrap.statistics.items()}
    assert again == pytest.approx(entity_metrics(*both, "iob2"), abs=1e-12)


def test_nothing_to_find() -> None:
    assert entity_metrics([["O", "O"]], [["O", "O"]], "iob2") == {
        "f1": 0.0, "precision": 0.0, "recall": 0.0, "f1_macro": 0.0, "f1_strict": 0.0, "accuracy": 1.0,
    }  # fmt: skip
    assert outside_baseline([["O", "B-X"], ["O", "O"]]) == {"f1": 0.0, "accuracy": 0.75}
    with pytest.raises(ValueError, match="a tag for each word"):
        entity_metrics([["O"]], [["O", "O"]], "iob2")
