"""Logistic regression and k-means on frozen sentence embeddings, by scikit-learn.

    python tools/sentences.py MODEL TRAIN.tsv DEV.tsv --text title description --label label --out DIR

The regression is trained on the training texts; its C is chosen on every fifth of them. k-means finds as many clusters
of the dev texts as there are labels, without the labels. The results are DIR/sentences.json and DIR/report.html.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from dualenc.data.text.files import TextIndex
from dualenc.metrics import label_bootstrap, majority_baseline
from dualenc.report import Description, Points, Section, print_table, verdict, write_report
from dualenc.utils.errors import DataError
from dualenc.utils.files import write_json

C_VALUES = (0.1, 1.0, 10.0, 100.0)
FIFTH = 5  # Every fifth training text is held out to choose C.
SHUFFLES = 200  # Permutations of the labels that give the purity of chance.


def sentences(
    embed: Callable[[list[str]], torch.Tensor],
    train: tuple[list[str], list[str]],
    dev: tuple[list[str], list[str]],
    dataset: str,
    model: str,
) -> Section:
    """Evaluate embeddings of texts by logistic regression and k-means.

    Args:
        embed: function from N texts to embeddings (N, D).
        train: training texts and their labels.
        dev: texts to evaluate on, and their labels.
        dataset: name of the data set.
        model: name of the model.

    Returns:
        The result and the points of its map.
    """
    names = sorted(set(train[1]))
    if unknown := sorted(set(dev[1]) - set(names)):
        raise SystemExit(f"{dataset}: no training text has the label {unknown[0]!r}")
    train_targets, targets = (np.array([names.index(label) for label in labels]) for _, labels in (train, dev))
    x, y = (embed(texts).double().cpu().numpy() for texts, _ in (train, dev))
    logits = torch.from_numpy(regression(x, train_targets).predict_log_proba(y))
    measures = label_bootstrap(logits, torch.from_numpy(targets), names)
    clusters = KMeans(len(names), n_init=10, random_state=0).fit_predict(y)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    plane = PCA(2, random_state=0)
    points = plane.fit_transform(y)
    explained = plane.explained_variance_ratio_.tolist()
    result = {
        "dataset": dataset,
        "kind": "sentences",
        "model": model,
        "n": len(y),
        "complete": True,
        "problems": [],
        "metrics": {"linear_acc1": measures.values()["accuracy"], "cluster_purity": purity(clusters, targets)},
        "intervals": {"linear_acc1": measures.intervals()["accuracy"]},
        "chance": {
            "linear_acc1": majority_baseline(torch.from_numpy(train_targets), torch.from_numpy(targets)),
            "cluster_purity": float(np.mean([purity(clusters, rng.permutation(targets)) for _ in range(SHUFFLES)])),
        },
    }
    result["baseline"] = "the most frequent training label (of clusters: shuffled labels)"
    note = f"{len(y):,} texts, in the two directions of the largest spread (principal components)."
    description = Description(
        "texts", "logistic regression and clusters on frozen sentence embeddings", ("linear_acc1",)
    )
    result["verdict"] = verdict(result, description)
    return Section(result, None, Points(points, targets, names, (explained[0], explained[1]), None, note), description)


def regression(x: np.ndarray, targets: np.ndarray) -> LogisticRegression:
    """Fit a logistic regression with the C that is most accurate on every fifth text after training on the others.

    Args:
        x: embeddings (N, D).
        targets: classes (N,).
    """

    def fit(rows: np.ndarray, c: float) -> LogisticRegression:
        return LogisticRegression(C=c, max_iter=2000).fit(x[rows], targets[rows])

    held_out = np.arange(len(x)) % FIFTH == 0
    best = max(C_VALUES, key=lambda c: fit(~held_out, c).score(x[held_out], targets[held_out]))
    return fit(np.ones_like(held_out), best)


def purity(clusters: np.ndarray, targets: np.ndarray) -> float:
    """Return the share of the texts in the most frequent class of their cluster (Manning et al. 2008, section 16.3)."""
    counts = np.zeros((clusters.max() + 1, targets.max() + 1), int)
    np.add.at(counts, (clusters, targets), 1)
    return float(counts.max(1).sum() / len(targets))


def read(path: Path, columns: Sequence[str], label: str) -> tuple[list[str], list[str]]:
    """Read the texts, with columns joined by a space, and the labels of a table."""
    try:
        lines = [line.read() for line in TextIndex.build(str(path), [*columns, label])]
    except DataError as error:
        raise SystemExit(str(error)) from None
    return [" ".join(line[name] for name in columns) for line in lines], [str(line[label]) for line in lines]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("dev", type=Path)
    parser.add_argument("--text", nargs="+", default=["text"], help="columns of the text, joined by a space")
    parser.add_argument("--label", default="label", help="column of the label")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    train, dev = (read(path, given.text, given.label) for path in (given.train, given.dev))
    from dualenc import load_text

    name = given.dev.parent.name or given.dev.stem
    section = sentences(load_text(given.model).embed, train, dev, name, given.model)
    print_table([section.result])
    given.out.mkdir(parents=True, exist_ok=True)
    write_json(given.out / "sentences.json", [section.result])
    about: dict[str, Any] = {"data": f"{given.train} {given.dev}", "command": " ".join(map(str, sys.argv))}
    print(f"report: {write_report(given.out, 'Sentence embeddings', [section], about)}")


if __name__ == "__main__":
    main()
