"""Logistic regression and k-means on frozen sentence embeddings, by scikit-learn.

    python tools/sentences.py MODEL TRAIN.tsv DEV.tsv --text title description --label label --out DIR

The regression learns from the training texts; its C is chosen on every fifth of them. The clusters are those of the dev
texts, as many as there are labels, found without these. Writes DIR/sentences.json and DIR/report.html.
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
from dualenc.report import Description, Points, Section, print_table, write_report
from dualenc.utils.errors import DataError
from dualenc.utils.files import write_json

STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # of C
FIFTH = 5
SHUFFLES = 200


def sentences(
    embed: Callable[[list[str]], torch.Tensor],
    train: tuple[list[str], list[str]],
    dev: tuple[list[str], list[str]],
    dataset: str,
    model: str,
) -> Section:
    """What simple methods find in embeddings of texts.

    Args:
        embed: from texts to vectors (N, D).
        train, dev: texts and their labels.
        dataset, model: their names.
    """
    names = sorted(set(train[1]))
    if unknown := sorted(set(dev[1]) - set(names)):
        raise SystemExit(f"{dataset}: no training text has the label {unknown[0]!r}")
    targets, asked = (np.array([names.index(label) for label in labels]) for _, labels in (train, dev))
    x, y = (embed(texts).double().cpu().numpy() for texts, _ in (train, dev))
    logits = torch.from_numpy(regression(x, targets).predict_log_proba(y))
    measures = label_bootstrap(logits, torch.from_numpy(asked), names)
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
        "metrics": {"linear_acc1": measures.values()["accuracy"], "cluster_purity": purity(clusters, asked)},
        "intervals": {"linear_acc1": measures.intervals()["accuracy"]},
        "chance": {
            "linear_acc1": majority_baseline(torch.from_numpy(targets), torch.from_numpy(asked)),
            "cluster_purity": float(np.mean([purity(clusters, rng.permutation(asked)) for _ in range(SHUFFLES)])),
        },
    }
    note = f"{len(y):,} texts, in the two directions of the largest spread (principal components)."
    description = Description(
        "texts", "logistic regression and clusters on frozen sentence embeddings", ("linear_acc1",)
    )
    return Section(result, None, Points(points, asked, names, (explained[0], explained[1]), None, note), description)


def regression(x: np.ndarray, targets: np.ndarray) -> LogisticRegression:
    """On all (N, D); of the Cs the one that is right most often on every fifth after learning from the others."""

    def learn(rows: np.ndarray, strength: float) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=2000).fit(x[rows], targets[rows])

    held = np.arange(len(x)) % FIFTH == 0
    best = max(STRENGTHS, key=lambda strength: learn(~held, strength).score(x[held], targets[held]))
    return learn(np.ones_like(held), best)


def purity(clusters: np.ndarray, targets: np.ndarray) -> float:
    """Share of the texts that have the most frequent class of their cluster (Manning et al. 2008, section 16.3)."""
    counts = np.zeros((clusters.max() + 1, targets.max() + 1), int)
    np.add.at(counts, (clusters, targets), 1)
    return float(counts.max(1).sum() / len(targets))


def read(path: Path, columns: Sequence[str], label: str) -> tuple[list[str], list[str]]:
    """Texts, several columns joined by a space, and labels."""
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
    parser.add_argument("--text", nargs="+", default=["text"], help="columns, joined by a space")
    parser.add_argument("--label", default="label", help="column")
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
