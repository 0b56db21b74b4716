"""From the findings of an evaluation set to what its part of the page says."""

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from dualenc.report.formatting import is_share, less_is_better, measured
from dualenc.report.model import Answers, ChoiceScores, Classes, Labels, Picture, Result, Section
from dualenc.report.plots import COLORS, embedding_map, reliability, spread

HEADLINES = (
    "acc1", "linear_acc1", "knn_acc1", "mean_average_precision", "image_retrieval_recall@1",
    "image_retrieval_recall@10", "text_text_retrieval_recall@1", "image_image_retrieval_recall@1", "text_score",
    "group_score", "accuracy", "spearman", "perplexity", "auroc",
)  # fmt: skip
WHOLE_MATRIX = 50  # classes; beyond, an overview and the worst of it
ALL_BARS, WORST, BEST = 60, 20, 10  # classes with a bar of their own; of more, so many of the two ends
SUREST = 8  # mistakes made with the most confidence
DRAWN = 4  # instances of each kind in a gallery


def headlines(result: Result) -> list[dict[str, Any]]:
    """The rows that stand at the top of the page."""
    return [row for row in rows(result) if row["name"] in HEADLINES]


def rows(result: Result) -> list[dict[str, Any]]:
    """Each metric with its interval and its chance, as far as known, and whether it lies on a scale from 0 to 1."""
    return [
        {
            "name": name,
            "value": value,
            "interval": result["intervals"].get(name),
            "chance": result["chance"].get(name),
            "share": is_share(name),
            "lower": less_is_better(name),
            "ece": name.endswith("ece"),
        }
        for name, value in result["metrics"].items()
    ]


def of_section(section: Section) -> dict[str, Any]:
    """What the template asks of a set."""
    found = section.findings
    page: dict[str, Any] = {
        "result": section.result,
        "rows": rows(section.result),
        "measured": measured(section.result),
        "map": _map(section),
    }
    if isinstance(found, Classes):
        return page | _classes(found)
    if isinstance(found, Labels):
        bars = [
            {"name": name, "value": float(value), "n": int(n)}
            for name, value, n in zip(found.names, found.precision, found.counts)
        ]
        return page | {"bars": _worst_first(bars), "of": "average precision"}
    if isinstance(found, ChoiceScores):
        return page | {"choices": _choices(found)}
    if isinstance(found, Answers):
        galleries = [_gallery(found, asked) for asked in ("text", "image")]
        return page | {"galleries": [gallery for gallery in galleries if gallery["answers"]]}
    return page


def draw(among: np.ndarray, count: int = DRAWN) -> list[int]:
    """Some of those that are true, drawn blindly: the same of the same number of them."""
    where = np.flatnonzero(among)
    return where[np.random.default_rng(0).permutation(len(where))[:count]].tolist()


def _map(section: Section) -> dict[str, Any] | None:
    points = section.points
    if points is None or len(points.xy) < 2:
        return None
    classes = len(np.unique(points.label))
    gray = 0 if classes <= COLORS else classes - COLORS
    return {
        "plot": embedding_map(points),
        "note": points.note,
        "explained": points.explained,
        "gray": gray,
        "count": len(points.xy),
        "pairs": points.pairs is not None and len(points.pairs) > 0,
    }


def _worst_first(bars: list[dict[str, Any]]) -> dict[str, Any]:
    """All bars in order, and those to show at once; classes without images are only counted."""
    known = sorted((bar for bar in bars if bar["n"]), key=lambda bar: bar["value"])
    few = len(known) <= ALL_BARS
    return {
        "all": known,
        "worst": known if few else known[:WORST],
        "best": [] if few else known[-BEST:],
        "without": len(bars) - len(known),
        "spread": spread([bar["value"] for bar in known]) if not few else None,
    }


def _classes(found: Classes) -> dict[str, Any]:
    names, count = list(found.names), len(found.names)
    pairs = Counter(zip(found.truth.tolist(), found.predicted.tolist()))
    total = np.bincount(found.truth, minlength=count)
    bars = [
        {"name": name, "value": pairs[c, c] / max(1, int(total[c])), "n": int(total[c])} for c, name in enumerate(names)
    ]
    # The most frequent mistakes; of equally frequent ones those of the smallest classes.
    wrong = sorted(
        ((n, -int(total[a]), a, b) for (a, b), n in pairs.items() if a != b), key=lambda item: (-item[0], -item[1])
    )
    confusions = [
        {
            "truth": names[a],
            "predicted": names[b],
            "n": n,
            "of": -of,
            "pictures": [
                _shown(found, int(i)) for i in np.flatnonzero((found.truth == a) & (found.predicted == b))[:4]
            ],
        }
        for n, of, a, b in wrong[:8]
    ]
    if count <= WHOLE_MATRIX:
        shown, overview = list(range(count)), None
    else:
        shown = sorted(list(dict.fromkeys(c for _, _, a, b in wrong for c in (a, b)))[:24])
        overview = _overview(pairs, total)
    matrix = {
        "names": [names[c] for c in shown],
        "rows": [(names[a], [(pairs[a, b], pairs[a, b] / total[a]) for b in shown]) for a in shown if total[a]],
        "overview": overview,
        "classes": count,
    }
    return {
        "bars": _worst_first(bars),
        "of": "right",
        "confusions": confusions,
        "surest": _surest(found),
        "matrix": matrix if shown else None,
        "reliability": reliability(found.calibration) if any(row[2] for row in found.calibration) else None,
    }


def _surest(found: Classes) -> list[dict[str, Any]]:
    """The mistakes made with the most confidence: now and then it is the label that is wrong."""
    if found.confidence is None:
        return []
    wrong = np.flatnonzero(found.truth != found.predicted)
    wrong = wrong[np.argsort(-found.confidence[wrong], kind="stable")][:SUREST]
    return [
        _shown(found, i)
        | {"truth": found.names[int(found.truth[i])], "predicted": found.names[int(found.predicted[i])]}
        for i in wrong.tolist()
    ]


def _shown(found: Classes, i: int) -> dict[str, Any]:
    return {"picture": found.picture(i), "confidence": None if found.confidence is None else found.confidence[i]}


def _overview(pairs: Mapping[tuple[int, int], int], total: np.ndarray, most: int = 250) -> bytes:
    """Shares of each class's images, truth down, answer across; of many classes the largest share in each cell."""
    cells = min(most, len(total))
    at = np.arange(len(total)) * cells // len(total)
    share = np.zeros((cells, cells))
    for (a, b), n in pairs.items():
        share[at[a], at[b]] = max(share[at[a], at[b]], n / total[a])
    pixels = np.zeros((cells, cells, 4), np.uint8)
    pixels[..., :3] = (74, 144, 217)  # opacity says how much, so that it reads on light and on dark
    pixels[..., 3] = np.sqrt(share) * 255  # single mistakes would not be seen otherwise
    side = max(1, round(480 / cells))
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((cells * side, cells * side), Image.Resampling.NEAREST).save(
        buffer, "PNG", optimize=True
    )
    return buffer.getvalue()


def item(kind: str, i: int, captions: Sequence[str], picture: Picture) -> dict[str, Any]:
    """An image as its picture, a text as its caption."""
    return {"picture": picture(i)} if kind == "image" else {"caption": captions[i]}


def _gallery(found: Answers, asked: str) -> dict[str, Any]:
    """Queries with what they found; each item is a caption or a picture."""
    other = "text" if asked == "image" else "image"

    def show(kind: str, i: int) -> dict[str, Any]:
        return item(kind, i, found.captions, found.picture)

    return {
        "asked": asked,
        "answers": [
            {
                "query": show(asked, answer.query),
                "rank": answer.rank,
                "best": [
                    show(other, i) | {"score": score, "right": i in answer.right}
                    for i, score in zip(answer.best, answer.scores)
                ],
                "right": None if answer.rank < len(answer.best) else show(other, answer.right[0]),
            }
            for answer in found.answers[asked]
        ],
    }


def _choices(found: ChoiceScores) -> list[dict[str, Any]]:
    """Some instances in which something is wrong, and some in which all is right."""
    verdicts = [_verdict(np.asarray(scores)) for scores in found.scores]
    right = np.array([all(map(all, verdict.values())) for verdict in verdicts], dtype=bool)
    chosen = []
    for i in draw(~right) + draw(right):
        scores = np.asarray(found.scores[i])  # (images, captions)
        first = scores == scores.max(1, keepdims=True)
        taken = first & (first.sum(1, keepdims=True) == 1)  # of equal scores none
        captions = [
            {
                "caption": caption,
                "scores": [
                    {"score": scores[column, row], "own": row == column, "taken": taken[column, row]}
                    for column in range(len(scores))
                ],
            }
            for row, caption in enumerate(found.captions[i])
        ]
        pictures = [found.picture(int(image)) for image in found.images[i]]
        counts = {name: (sum(flags), len(flags)) for name, flags in verdicts[i].items()}
        chosen.append({"right": bool(right[i]), "counts": counts, "pictures": pictures, "captions": captions})
    return chosen


def _verdict(scores: np.ndarray) -> dict[str, list[bool]]:
    """Of each image whether its own caption scores above the others, of each such caption whether its image does."""
    own = np.diag(scores)  # (I,)
    away = ~np.eye(*scores.shape, dtype=bool)
    found = {"captions": [bool((row[here] < score).all()) for row, here, score in zip(scores, away, own)]}
    if len(scores) > 1:
        found["images"] = [bool((row[here] < score).all()) for row, here, score in zip(scores.T, away.T, own)]
    return found
