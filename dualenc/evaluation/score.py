"""From embeddings of a set to its figures, and to what a report shows of it."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet, Problem
from dualenc.data.shards.shard import content_hash
from dualenc.evaluation.embed import EmbeddingCache, SetEmbeddings, Track, embed_pictures, embed_set
from dualenc.inference.embedder import Embedder
from dualenc.metrics import (
    BootstrapMetrics,
    Scores,
    average_precision,
    calibration,
    choice_bootstrap,
    choice_metrics,
    classification_bootstrap,
    classification_metrics,
    group_bootstrap,
    group_metrics,
    knn_probe,
    linear_probe,
    multilabel_bootstrap,
    multilabel_metrics,
    per_class,
    retrieval_answers,
    retrieval_bootstrap,
    retrieval_metrics,
)
from dualenc.report import Answers, ChoiceScores, Classes, Labels, Points, Section

NAMES = 20  # of what is the matter, that a result says
POINTS = 2000  # of an embedding map, at most
UNDECODABLE = "image that cannot be decoded"


class Evaluated(NamedTuple):
    """What an evaluation found."""

    section: Section  # the figures, and what stands behind them in a report
    items: dict[str, Tensor]  # outcomes of each item, from which the figures can be made again; see `measures`


def evaluate(
    embedder: Embedder, data: BenchmarkSet | str | os.PathLike[str], workers: int = 0, track: Track = iter
) -> dict[str, Any]:
    """Zero-shot classification, retrieval or compositional choice on an evaluation set, by its own type.

    Args:
        embedder: the model.
        data: a set, or what `BenchmarkSet.open` takes.
        workers: processes that decode.
        track: wraps the image batches, for a progress bar.

    Returns:
        `dataset`, `kind`, `model`, `n` (images), `complete`, `problems` (what is the matter: `what`, `count`, some
        `names`), `metrics` (name to number), `intervals` (name to lower and upper 95% bound), `chance` (what an order
        drawn at random would give, where that is known); for classes `per_class` and `calibration` besides. All as
        plain Python, ready for JSON.

    Raises:
        DataError: there is nothing to measure.
    """
    data = data if isinstance(data, BenchmarkSet) else BenchmarkSet.open(data)
    embedded = embed_set(embedder, data, workers, track)
    return score(data, embedded, embedder).section.result


def score(data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder) -> Evaluated:
    """What `evaluate` returns, and what the report shows of it, from the embeddings of a whole set.

    Raises:
        ValueError: nothing is left to measure, or the embeddings are not finite.
    """
    image, text, rows, bad = embedded
    if not len(image):
        raise ValueError(
            f"{data.name}: no picture can be decoded, such as {bad[0][1]}" if bad else "it has no pictures"
        )
    problems = _problems(data, bad)
    number = torch.full((len(data),), -1).index_put((rows,), torch.arange(len(rows)))  # of a sample among the rows
    ids = torch.from_numpy(data.item_ids.view(np.int64))[rows]

    def picture(i: int) -> bytes:
        return data.thumbnail(int(rows[i]))

    if data.kind == "retrieval":
        captions, owner = data.captions
        kept = number[owner] >= 0
        captions = [captions[i] for i in torch.nonzero(kept)[:, 0].tolist()]
        return score_retrieval(
            data.name, image, text[kept], captions, number[owner[kept]], picture, embedder.name, problems, ids
        )
    if data.kind == "choice":
        images_of, texts_of, _ = data.choices
        images_of = images_of if bool((images_of >= 0).all()) else images_of[:, :1]
        kept = (number[images_of] >= 0).all(1)
        if not bool(kept.any()):
            raise ValueError(f"{data.name}: no instance has all of its pictures, such as {bad[0][1]}")
        images_of, texts_of = number[images_of[kept]], texts_of[kept]
        found = choice_metrics(image, text, images_of, texts_of)
        captions = [[data.texts[i] for i in pair] for pair in texts_of.tolist()]
        findings = ChoiceScores(captions, images_of.numpy(), found.items["scores"].numpy(), picture)
        result = _result(data.name, "choice", embedder.name, len(texts_of), found, problems)
        items = {"ids": torch.cat([ids[images_of], _hashes(data.texts)[texts_of]], 1), **found.items}
        return Evaluated(Section(result, findings), items)
    targets = data.targets[rows]
    if data.kind == "multilabel":
        scores = image @ text.T
        found = multilabel_metrics(scores, targets)
        precision = average_precision(scores, targets)
        findings = Labels(data.classnames, targets.sum(0).numpy(), precision.numpy())
        result = _result(data.name, "multilabel", embedder.name, len(image), found, problems)
        return Evaluated(Section(result, findings), {"ids": ids, **found.items})
    scale = float(embedder.model.logits()[0].detach())
    found = classification_metrics(image, text, targets, scale)
    result = _result(data.name, "classification", embedder.name, len(image), found, problems)
    points = _map(image, targets, data.classnames)
    return Evaluated(
        Section(_with_classes(result, found.items, data.classnames), _classes(data, found.items, picture), points),
        {"ids": ids, **found.items},
    )


def score_retrieval(
    name: str,
    image: Tensor,
    text: Tensor,
    captions: Sequence[str],
    owner: Tensor,
    picture: Callable[[int], bytes],
    model: str,
    problems: Sequence[Problem] = (),
    ids: Tensor | None = None,
) -> Evaluated:
    """Like `score`, for images (I, E) and captions (T, E), caption i belonging to image owner[i].

    Images without a caption are left out.
    """
    asked = torch.unique(owner)
    image, owner = image[asked], torch.searchsorted(asked, owner)
    found = retrieval_metrics(image, text, owner)
    findings = Answers(captions, retrieval_answers(found.items), lambda i: picture(int(asked[i])))
    result = _result(name, "retrieval", model, len(image), found, problems)
    kinds = torch.cat([torch.zeros(len(image), dtype=torch.int64), torch.ones(len(text), dtype=torch.int64)])
    points = _map(torch.cat([image, text]), kinds, ["images", "captions"], owner)
    items = dict(found.items)
    if ids is not None:
        items |= {"ids": ids[asked], "text_ids": _hashes(captions)}
    return Evaluated(Section(result, findings, points), items)


def score_within(data: BenchmarkSet, embedded: SetEmbeddings, embedder: Embedder, between: str) -> Evaluated:
    """Retrieval among things of one kind: captions of one image, or pictures of one class.

    Args:
        data: a retrieval set for `text-text`, a classification set for `image-image`.
        embedded: its embeddings.
        embedder: the model.
        between: `text-text` or `image-image`.
    """
    image, text, rows, bad = embedded
    if between == "text-text":
        x, group, bad = text, data.captions[1], []  # no picture is asked for
        found = group_metrics(x, group, unit=group)
    else:
        x, group = image, data.targets[rows]
        found = group_metrics(x, group)
    prefix = between.replace("-", "_") + "_retrieval_"
    found = _prefixed(found, prefix)
    result = _result(data.name, between, embedder.name, len(x), found, _problems(data, bad))
    if between == "text-text":
        return Evaluated(Section(result, None), {"text_ids": _hashes(data.captions[0]), **found.items})
    ids = torch.from_numpy(data.item_ids.view(np.int64))
    return Evaluated(Section(result, None), {"ids": ids[rows], **found.items})


def probe(
    embedder: Embedder,
    data: BenchmarkSet,
    train: BenchmarkSet,
    held: BenchmarkSet | None = None,
    workers: int = 0,
    track: Track = iter,
    cache: EmbeddingCache | None = None,
) -> Evaluated:
    """A linear classifier and neighbors' votes on frozen image embeddings.

    Args:
        embedder: the model.
        data: to measure on.
        train: to learn from.
        held: to choose the regularization and the number of neighbors by; absent, a fifth of what is learned from.
        workers, track, cache: see `embed_set`.
    """
    embedded = {}
    problems: list[Problem] = []
    for name, item in {"test": data, "train": train, **({} if held is None else {"held": held})}.items():
        image, rows, bad = embed_pictures(embedder, item, range(len(item)), workers, track, cache)
        embedded[name] = image, item.targets[rows], rows
        problems += _problems(item, bad, f" ({item.split})")
    image, targets, rows = embedded["test"]
    known, classes, _ = embedded["train"]
    chosen_by = None if held is None else embedded["held"][:2]
    linear, knn = (how(known, classes, image, targets, held_out=chosen_by) for how in (linear_probe, knn_probe))
    if linear.missing:
        names = [data.classnames[c] for c in linear.missing]
        problems.append(Problem(f"class without a picture to learn from ({train.split})", names))
    found = [_prefixed(linear.scores, "linear_"), _prefixed(knn.scores, "knn_")]
    parts: list[Any] = [{**x, **y} for x, y in zip(*found, strict=True)]
    both = Scores(*parts)
    result = _result(data.name, "probe", embedder.name, len(image), both, problems)
    result["chosen"] = {
        f"{name}_{key}": value for name, one in (("linear", linear), ("knn", knn)) for key, value in one.chosen.items()
    }
    result["trained_on"] = len(known)

    def picture(i: int) -> bytes:
        return data.thumbnail(int(rows[i]))

    ids = torch.from_numpy(data.item_ids.view(np.int64))[rows]
    findings = _classes(data, linear.scores.items, picture)
    section = Section(_with_classes(result, linear.scores.items, data.classnames), findings)
    return Evaluated(section, {"ids": ids, **both.items})


def measures(kind: str, items: Mapping[str, Tensor]) -> BootstrapMetrics:
    """The figures of a result as functions of its items, from the items.

    Args:
        kind: of the result.
        items: as `Evaluated` has them.
    """
    if kind == "probe":
        parts = {
            name: classification_bootstrap(
                {key.removeprefix(name): x for key, x in items.items() if key.startswith(name)}
            )
            for name in ("linear_", "knn_")
        }
        both = {f"{name}{metric}": f for name, part in parts.items() for metric, f in part.statistics.items()}
        return parts["linear_"]._replace(statistics=both)
    if kind in ("text-text", "image-image"):
        prefix = kind.replace("-", "_") + "_retrieval_"
        part = group_bootstrap({key.removeprefix(prefix): x for key, x in items.items()})
        return part._replace(statistics={f"{prefix}{name}": f for name, f in part.statistics.items()})
    of = {
        "classification": classification_bootstrap,
        "multilabel": multilabel_bootstrap,
        "retrieval": retrieval_bootstrap,
        "choice": choice_bootstrap,
    }
    return of[kind](dict(items))


def _hashes(texts: Sequence[str]) -> Tensor:
    """(T,) int64 of what the texts say."""
    return torch.tensor([content_hash(text.encode()) >> 1 for text in texts])


def _prefixed(found: Scores, prefix: str) -> Scores:
    parts: list[Any] = [{f"{prefix}{name}": x for name, x in part.items()} for part in found]
    return Scores(*parts)


def _problems(data: BenchmarkSet, bad: Sequence[tuple[int, str]], where: str = "") -> list[Problem]:
    found = [*data.problems]
    if bad:
        found.append(Problem(UNDECODABLE, [cause for _, cause in bad]))
    return [Problem(problem.what + where, problem.names) for problem in found]


def _result(name: str, kind: str, model: str, count: int, found: Scores, problems: Sequence[Problem]) -> dict[str, Any]:
    return {
        "dataset": name,
        "kind": kind,
        "model": model,
        "n": count,
        "complete": not problems,
        "problems": [
            {"what": problem.what, "count": len(problem.names), "names": problem.names[:NAMES]} for problem in problems
        ],
        "metrics": found.metrics,
        "intervals": {name: list(bounds) for name, bounds in found.intervals.items()},
        "chance": found.chance,
    }


def _with_classes(result: dict[str, Any], items: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Any]:
    right, total = per_class(items)
    return {
        **result,
        "per_class": [[name, float(r / n), int(n)] for name, r, n in zip(names, right, total) if n],
        "calibration": [list(row) for row in calibration(items)],
    }


def _classes(data: BenchmarkSet, items: Mapping[str, Tensor], picture: Callable[[int], bytes]) -> Classes:
    return Classes(
        data.classnames,
        items["target"].numpy(),
        items["answer"].numpy(),
        picture,
        items["confidence"].numpy(),
        calibration(items),
    )


def _map(x: Tensor, label: Tensor, names: Sequence[str], owner: Tensor | None = None) -> Points:
    """The plane in which the embeddings (N, E), or some of them drawn blindly, spread most: principal components.

    Args:
        x: embeddings of things of several kinds.
        label: (N,) which.
        names: of the kinds.
        owner: of captions, which follow the images, the image of each: drawn are images, each with its first caption.
    """

    def drawn(count: int, most: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:most].sort().values

    pairs, note = None, "images"
    if owner is None:
        chosen = drawn(len(x), POINTS)
    else:
        images = len(x) - len(owner)
        few = drawn(images, POINTS // 2)
        first = torch.full((images,), len(x)).scatter_reduce(0, owner, torch.arange(images, len(x)), "amin")
        chosen, note = torch.cat([few, first[few]]), "images and the first caption of each, joined by a line"
        pairs = torch.arange(2 * len(few)).view(2, -1).T.numpy()
    points = x[chosen].double()
    points = points - points.mean(0)
    values, vectors = torch.linalg.eigh(points.T @ points)
    share = values[-2:].flip(0) / values.sum().clamp(min=1e-30)
    directions = vectors[:, -2:].flip(1)
    directions = directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()  # else either way
    return Points(
        (points @ directions).numpy(),
        label[chosen].numpy(),
        list(names),
        (float(share[0]), float(share[1])),
        pairs,
        f"{len(chosen) if pairs is None else len(pairs):,} {note}, in the two directions of the largest spread "
        "(principal components).",
    )
