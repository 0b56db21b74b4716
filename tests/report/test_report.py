"""Reports: their contents, that nothing in them can run, and their looks in a real browser."""

import base64
import dataclasses
import html
import io
import json
import re
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import caption, encode, smooth, write_benchmark, write_tar
from PIL import Image

from dualenc.data.doctor.checks import examine
from dualenc.report import (
    Answers,
    ChoiceScores,
    Classes,
    Comparison,
    Description,
    Findings,
    Labels,
    Points,
    Ranked,
    Section,
    TwoAnswers,
    TwoRankings,
    print_comparison,
    print_table,
    write_comparison,
    write_examination,
    write_report,
)
from dualenc.report.plots import curves as plot_curves
from dualenc.report.plots import embedding_map, reliability
from dualenc.utils.files import write_json

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<script>document.title='x'</script><img src=x onerror=alert(1)> & \"quotes\" ' {{ 7 * 7 }}"


class Answer(NamedTuple):
    query: int
    rank: int
    best: list[int]
    scores: list[float]
    right: list[int]


def result(dataset: str, metrics: dict[str, float], n: int = 100, kind: str = "classification") -> dict[str, Any]:
    return {
        "dataset": dataset, "kind": kind, "model": "runs/x", "n": n, "complete": True, "problems": [],
        "metrics": metrics, "chance": dict.fromkeys(metrics, 0.01),
        "intervals": {name: [0.9 * value, min(1.0, 1.1 * value)] for name, value in metrics.items()},
    }  # fmt: skip


DESCRIPTIONS = {
    "classification": Description("images", "zero-shot classification", ("acc1",)),
    "retrieval": Description("images", "retrieval", ("image_retrieval_recall@1",)),
    "choice": Description("instances", "choice", ("text_score",)),
    "multilabel": Description("images", "several labels", ("mean_average_precision",)),
    "text-text": Description("captions", "captions of the same image", ("text_text_retrieval_recall@1",)),
}


def problem(count: int) -> dict[str, Any]:
    names = [f"0.tar: {EVIL} {i}" for i in range(count)][:20]
    return {"what": f"images that cannot be decoded {EVIL}", "count": count, "names": names}


def classes(rng: np.random.Generator, count: int, images: int, picture: Callable[[int], bytes]) -> Classes:
    """Return predictions whose accuracy grows with their confidence, and malicious class names."""
    names = [EVIL if i % 2 == 0 else f"class {i} with a long name" for i in range(count)]
    truth, confidence = rng.integers(count, size=images), rng.random(images)
    predicted = np.where(rng.random(images) < confidence, truth, (truth + 1 + rng.integers(2, size=images)) % count)
    bins = [(confidence >= low) & (confidence < low + 0.1) for low in np.arange(0, 1, 0.1)]
    calibration = [
        [confidence[own].mean(), (truth == predicted)[own].mean(), int(own.sum())] for own in bins if own.any()
    ]
    return Classes(names, truth, predicted, picture, confidence, [*calibration, [0.0, 0.0, 0]])


def ranked(rng: np.random.Generator, texts: int, images: int) -> Ranked:
    by_text, by_image = (np.minimum(rng.geometric(0.4, n) - 1, 5) for n in (texts, images))
    owner = np.arange(texts) // 2
    best_by_text = np.array([rng.choice(np.delete(np.arange(images), owner[i]), 5, False) for i in range(texts)])
    best_by_image = np.array(
        [rng.choice(np.delete(np.arange(texts), [2 * i, 2 * i + 1]), 5, False) for i in range(images)]
    )
    for ranks, best, own in ((by_text, best_by_text, owner), (by_image, best_by_image, 2 * np.arange(images))):
        for i in np.flatnonzero(ranks < 5):
            best[i, ranks[i]] = own[i]
    return Ranked(by_text, best_by_text, by_image, best_by_image)


def answers(found: Ranked, captions: list[str], picture: Callable[[int], bytes]) -> Answers:
    def of(rank: np.ndarray, best: np.ndarray, own: Callable[[int], list[int]]) -> list[Answer]:
        some = [*np.flatnonzero(rank == 0)[:4].tolist(), *np.flatnonzero(rank > 0)[:4].tolist()]
        return [Answer(i, int(rank[i]), best[i].tolist(), [0.3, 0.2, 0.1, 0.0, -0.1], own(i)) for i in some]

    by_text = of(found.rank_by_text, found.best_by_text, lambda i: [i // 2])
    by_image = of(found.rank_by_image, found.best_by_image, lambda i: [2 * i, 2 * i + 1])
    return Answers(captions, {"text": by_text, "image": by_image}, picture)


def points(rng: np.random.Generator, label: np.ndarray, names: list[str]) -> Points:
    centers = 2 * rng.standard_normal((len(names), 2))
    return Points(
        centers[label] + rng.standard_normal((len(label), 2)), label, names, (0.21, 0.083), note="All of them."
    )


def pictures_of(rng: np.random.Generator, count: int) -> Callable[[int], bytes]:
    return [encode(smooth(rng, *rng.integers(30, 90, 2)), "jpeg") for _ in range(count)].__getitem__


def section(result: dict[str, Any], findings: Findings | None = None, points: Points | None = None) -> Section:
    return Section(result, findings, points, DESCRIPTIONS[result["kind"]])


def sections(seed: int, count: int = 12, images: int = 60) -> list[Section]:
    """Return a section of each kind, with pictures; the first has a problem."""
    rng = np.random.default_rng(seed)
    picture = pictures_of(rng, images)
    found = classes(rng, count, images, picture)
    right = float((found.truth == found.predicted).mean())
    zeroshot = result("photos", {"acc1": right, "acc5": 0.9, "mean_per_class_recall": right, "ece": 0.0834}, images)
    del zeroshot["chance"]["ece"]
    zeroshot |= {"complete": False, "problems": [problem(31)]}
    captions = [EVIL if i % 4 == 0 else caption(rng) for i in range(2 * images)]
    names = ("image_retrieval_recall@1", "image_retrieval_recall@10", "text_retrieval_all@10", "median_rank")
    retrieval = result("pairs", dict(zip(names, (0.4, 0.8, 0.3, 2.5))), images, "retrieval")
    retrieval["intervals"]["median_rank"] = [2.0, 3.5]
    pairs = points(rng, np.arange(2 * images) // images, ["images", "captions"])
    pairs = dataclasses.replace(pairs, pairs=np.arange(2 * images).reshape(2, images).T)
    precision = Labels(found.names, np.arange(count), np.linspace(0, 1, count))
    choices = ChoiceScores(
        [captions[i : i + 2] for i in range(0, images, 2)],
        np.arange(images).reshape(-1, 2),
        rng.random((images // 2, 2, 2)) + 0.3 * np.eye(2),
        picture,
    )
    scores = dict(zip(("text_score", "image_score", "group_score"), (0.5, 0.4, 0.3)))
    within = result("captions", {"text_text_retrieval_recall@1": 0.3}, images, "text-text")
    return [
        section(zeroshot, found, points(rng, found.truth, list(found.names))),
        section(retrieval, answers(ranked(rng, 2 * images, images), captions, picture), pairs),
        section(result("labels", {"mean_average_precision": 0.4}, images, "multilabel"), precision),
        section(result("orders", scores, images // 2, "choice"), choices),
        section(within),
    ]


def comparisons(seed: int, images: int = 60) -> list[Comparison]:
    """Return comparisons of two models, on two sets with galleries and one without."""
    rng = np.random.default_rng(seed)
    picture = pictures_of(rng, images)
    first, second = (classes(rng, 12, images, picture) for _ in range(2))
    captions = [EVIL if i % 4 == 0 else caption(rng) for i in range(2 * images)]
    both = [np.where(rng.random(images) < 0.6, first.truth, found.predicted) for found in (first, second)]
    head = {"n": images, "complete": True, "first": f"runs/{EVIL}", "second": "runs/y"}
    differences = {
        "photos": {"acc1": [0.612, 0.655, 0.043, 0.011, 0.075], "ece": [0.081, 0.062, -0.019, -0.03, -0.004]},
        "pairs": {
            "image_retrieval_recall@1": [0.4, 0.38, -0.02, -0.05, 0.01],
            "median_rank": [2.0, 3.0, 1.0, 0.5, 2.0],
        },
        "labels": {"mean_average_precision": [0.4, 0.4, 0.0, 0.0, 0.0]},
    }
    kinds = {"photos": "classification", "pairs": "retrieval", "labels": "multilabel"}
    results = [{"dataset": name, "kind": kinds[name], **head, "differences": x} for name, x in differences.items()]
    results[1]["complete"] = False
    taken = TwoAnswers(first.names, first.truth, (both[0], both[1]), (rng.random(images), rng.random(images)), picture)
    found = ranked(rng, 2 * images, images), ranked(rng, 2 * images, images)
    ranks = TwoRankings(captions, np.arange(2 * images) // 2, found, picture)
    findings = (taken, ranks, None)
    return [Comparison(one, found, DESCRIPTIONS[one["kind"]]) for one, found in zip(results, findings, strict=True)]


def examination(folder: Path, seed: int) -> Path:
    """Write the page on shards with every kind of problem, malicious keys and captions, and a leak."""
    rng = np.random.default_rng(seed)
    other = write_benchmark(folder / "other", seed, "retrieval", counts=(9,))
    with open(other / "test" / "0.tar", "rb") as file, tarfile.open(fileobj=file) as tar:
        leaked = [tar.extractfile(item).read() for item in tar if item.name.endswith(".jpg")]  # type: ignore[union-attr]
    sides = [(int(h), int(w)) for h, w in rng.integers(20, 300, (60, 2))]
    images = [
        *(encode(smooth(rng, *side), "jpeg") for side in sides),
        *leaked,
        *leaked[:4],
        b"",
        b"<html>",
        b"\xff\xd8\xff",
    ]
    texts = [EVIL if i % 5 == 0 else caption(rng) for i in range(len(images))]
    samples = [
        {"__key__": f"{EVIL.replace('.', '')}/{i}" if i % 3 else "k" * 200 + f"{i}", "jpg": image, "txt": text.encode()}
        for i, (image, text) in enumerate(zip(images, texts))
    ]
    write_tar(folder / "0.tar", samples)
    (folder / "1.tar").write_bytes(b"")
    found = examine(folder, sample=None, against=[other], workers=0)
    galleries = {
        title: [[(label, found.picture(item)) for label, item in group] for group in groups]
        for title, groups in found.galleries.items()
    }
    marks = {"words of a caption": 5.0}
    data = {"data": "shards/" + "x" * 200}
    return write_examination(
        folder / "out", "Before a run", found.result(), found.distributions, galleries, data, marks
    )


@pytest.fixture
def curves(tmp_path: Path) -> Path:
    lines = ["step,metric,value"]
    for step in range(10, 200, 10):
        lines += [f"{step},train/loss,{5 / step}", f"{step},train/lr,0.001", f"{step},photos/acc1,{step / 200}"]
    lines += [
        f"{step},val/{name},{value}"
        for step in (50, 100)
        for name, value in (("loss", 3.0), ("image_retrieval_recall@1", 0.2))
    ]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "metrics.csv"


class Elements(HTMLParser):
    """Elements of a page as a browser would parse them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("kind", ["sets", "comparison"])
def test_page_runs_and_loads_nothing(tmp_path: Path, curves: Path, seed: int, kind: str) -> None:
    if kind == "sets":
        path = write_report(tmp_path, f"A run {EVIL}", sections(seed), {"data": EVIL}, curves)
    else:
        path = write_comparison(tmp_path, f"Two runs {EVIL}", comparisons(seed), {"data": EVIL})
    page = path.read_text("utf-8")
    found = Elements(page)
    assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & set(found.tags)
    assert not found.handlers
    assert all(source.startswith(("data:image/", "#")) for source in found.sources)
    assert found.tags.count("img") > 20
    assert "onerror=alert(1)" in found.text  # shown as text
    assert "49" not in re.findall(r"quotes&#34; &#39; (.*?)<", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert html.unescape(policy[1]).startswith("default-src 'none'")
    assert "script" not in policy[1]


def test_page_of_doctor_runs_and_loads_nothing(tmp_path: Path, seed: int) -> None:
    found = Elements(examination(tmp_path / "data", seed).read_text("utf-8"))
    assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & set(found.tags)
    assert not found.handlers
    assert all(source.startswith(("data:image/", "#")) for source in found.sources)
    assert found.tags.count("img") > 20
    assert found.tags.count("svg") > 4
    assert found.text.count("onerror=alert(1)") > 4  # in keys and captions, shown as text
    for title in ("The smallest images", "Equal images", "Also in other", "Most frequent captions", "cut at 5"):
        assert title in found.text


def test_page_shows_every_metric(tmp_path: Path, curves: Path, seed: int) -> None:
    given = sections(seed)
    page = write_report(tmp_path, "A run", given, None, curves).read_text("utf-8")
    assert re.findall(r'<h2 id="set-\d">(.*)</h2>', page) == [one.result["dataset"] for one in given]
    text = " ".join(Elements(page).text.split())
    for one in given:
        for name, value in one.result["metrics"].items():
            digits = 1 if name == "median_rank" else 3
            bounds = one.result["intervals"][name]
            numbers = [f"{x:.{digits}f}" for x in (value, *bounds)]
            row = [name, "(lower is better)?", *numbers[:2], "to", numbers[2]]
            row += [f"{x:.3f}" for x in [one.result["chance"].get(name)] if x is not None]
            assert re.search(r"\s*".join(row), text), row
    assert "held-out pairs" in text  # a plot's title
    write_json(tmp_path / "zeroshot.json", [one.result for one in given])
    assert json.loads((tmp_path / "zeroshot.json").read_text()) == [one.result for one in given]


def test_unknown_chance_has_no_mark(tmp_path: Path) -> None:
    known, unknown = (result("pets", {name: 0.5}, 6) for name in ("acc1", "ece"))
    unknown["chance"] = {}
    marks = [
        write_report(tmp_path, "Pets", [section(one)]).read_text("utf-8").count('class="chance"')
        for one in (known, unknown)
    ]
    assert marks == [2, 0]  # on a card and in the table; ece has neither


def test_problems_are_shown_with_their_set(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    given = sections(seed)
    page = write_report(tmp_path, "A run", given).read_text("utf-8")
    cards, *parts = page.split("<h2 ")
    assert cards.count("incomplete") == 1  # on the card of acc1
    assert [part.count("incomplete") for part in parts] == [1, 0, 0, 0, 0]
    head = parts[0][: parts[0].index("<table")]
    shown, folded = head.split("<details>")
    assert "images that cannot be decoded" in shown
    assert re.search(r"\b31\b", shown)
    assert folded.count("<li>") == 20
    assert "0.tar" not in shown
    assert "first 20 names" in folded

    given[0].result["problems"][0]["names"][1] = "0.tar: \x1b[2J"
    print_table([one.result for one in given])
    printed = capsys.readouterr().out
    assert printed.count("incomplete") == 1
    last = printed.splitlines()[-1]
    assert last.startswith("photos: images that cannot be decoded")
    assert ": 31 (" in last
    assert last.count("0.tar") == 3
    assert last.endswith("...)")
    assert "\x1b" not in printed


def test_all_sets_are_in_one_table(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    given = [one.result for one in sections(seed)]
    print_table(given)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["set", "n", "metric", "value", "95%", "interval", "chance"]
    wanted = []
    for number, one in enumerate(given):
        wanted += [[]] * (number > 0)
        for row, (name, value) in enumerate(one["metrics"].items()):
            digits = 1 if name == "median_rank" else 3
            low, high = one["intervals"][name]
            head = {0: [one["dataset"], str(one["n"])], 1: ["incomplete"] * (not one["complete"])}.get(row, [])
            cells = [name, f"{value:.{digits}f}", f"{low:.{digits}f}", "to", f"{high:.{digits}f}"]
            chance = [f"{x:.3f}" for x in [one["chance"].get(name)] if x is not None]
            wanted.append([*head, *cells, *chance])
    assert lines[1:-1] == wanted


def test_confusions_are_counted(tmp_path: Path) -> None:
    """Check three of four cats predicted as dogs, one of two dogs as a cat, and a class without images."""
    picture = encode(np.zeros((8, 8, 3), np.uint8))
    truth, taken = np.array([0, 0, 0, 0, 1, 1]), np.array([1, 1, 1, 0, 0, 1])
    found = Classes(["cat", "dog", "yak"], truth, taken, lambda i: picture)
    page = write_report(tmp_path, "Pets", [section(result("pets", {"acc1": 1 / 3}, 6), found)])
    text = re.sub(r"\s", "", Elements(page.read_text("utf-8")).text)
    assert 'class="matrix few"' in page.read_text("utf-8")
    first, second = text.index("catpredictedasdog3of4images"), text.index("dogpredictedascat1of2images")
    assert first < second
    assert "1classhasnoimages" in text
    assert "cat0.250of4" in text
    assert "dog0.500of2" in text


def test_texts_are_escaped_and_cut(tmp_path: Path, seed: int) -> None:
    """Check the page of classified texts: mistakes with their texts, the most confident first, and no pictures."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(3, size=40)
    predicted, confidence = (truth + rng.integers(2, size=40)) % 3, rng.permutation(40) / 40
    texts = [f"{i}. {EVIL}" + "x" * 5000 for i in range(40)]
    names = [f"{name} {EVIL}" for name in ("good", "bad", "so so")]
    found = Classes(names, truth, predicted, texts.__getitem__, confidence, unit="texts")
    page = write_report(tmp_path, "Moods", [section(result("moods", {"acc1": 0.5}, 40), found)]).read_text("utf-8")
    assert len(page) < 120_000
    elements = Elements(page)
    assert not {"img", "script"} & set(elements.tags)
    assert "7 * 7" in elements.text
    part = page[page.index("Most confident mistakes") : page.index("Confusion matrix")]
    shown = [int(i) for i in re.findall(r"<q>(\d+)\.", part)]
    wrong = np.flatnonzero(truth != predicted)
    assert shown == wrong[np.argsort(-confidence[wrong])][:8].tolist()
    assert "images" not in page[page.index("Most frequent") : page.index("<footer")]


def test_every_curve_is_drawn_and_one_point_has_its_value(tmp_path: Path, seed: int) -> None:
    """Check that no curve is lost among many, and that a curve of one point shows its value."""
    rng = np.random.default_rng(seed)
    heads = [f"head{i}" for i in range(int(rng.integers(3, 9)))]
    names = ["train/loss", *(f"{part}/{head}/loss" for head in heads for part in ("train", "val"))]
    lines = [f"{step},{name},{rng.random() + 1}" for name in names for step in (10, 20)]
    lines += [f"20,{name},{value}" for name, value in (("pets/acc1", 0.4321), ("pets/acc5", 0.8765))]
    lines += ["20,train/lr,0.00123", "20,val/loss,nan"]
    (tmp_path / "metrics.csv").write_text("\n".join(["step,metric,value", *lines]) + "\n")
    drawn = {plot["title"]: str(plot["svg"]) for plot in plot_curves(tmp_path / "metrics.csv")}
    losses = [svg for title, svg in drawn.items() if title.startswith("loss")]
    assert len(losses) == -(-(len(names) + 1) // 6)
    for name in names:
        assert sum(f">{name}<" in svg for svg in losses) == 1, name
    for head in heads[: len(losses)]:  # The two losses of a head share a plot, since their number is even.
        assert any(f">train/{head}/loss<" in svg and f">val/{head}/loss<" in svg for svg in losses)
    assert ">acc1  0.432<" in drawn["pets"]
    assert ">acc5  0.876<" in drawn["pets"] or ">acc5  0.877<" in drawn["pets"]
    assert ">0.0012<" in drawn["learning rate"]


def test_page_holds_no_python(tmp_path: Path) -> None:
    """Check that mappings and sequences among the facts are written as text."""
    about = {"tower": {"patch_size": 4, "sizes": [7, 14]}, "data": ["a.tar", "b.tar"], "none": {}}
    text = Elements(write_report(tmp_path, "A run", [], about).read_text("utf-8")).text
    assert "patch_size 4, sizes 7 14" in text
    assert "a.tar b.tar" in text
    assert not re.search(r"[{\[]['\"]", text.split("A run")[-1])


def test_calibration_is_drawn_to_scale(seed: int) -> None:
    """Check that each bin has a dot at its confidence and accuracy, its area its count; empty bins have none."""
    rng = np.random.default_rng(seed)
    bins = np.array([*rng.random((4, 2)), [0.5, 0.1]])
    count = [*(rng.choice(1000, 4, replace=False) + 1).tolist(), 0]
    svg = str(reliability([[*map(float, row), n] for row, n in zip(bins, count)]))
    ends = re.search(r"M ([\d.]+) ([\d.]+) \s*L ([\d.]+) ([\d.]+)[^>]*dasharray: \d", svg)  # from (0, 0) to (1, 1)
    assert ends is not None
    x0, y0, x1, y1 = map(float, ends.groups())
    dots = re.findall(r'<path d="(M [^"L]*C [^"L]*)"[^>]*fill: #4a90d9', svg)
    assert len(dots) == 4
    sizes = []
    for dot, (confidence, accuracy) in zip(dots, bins):
        points = np.array([float(x) for x in re.findall(r"[\d.-]+", dot)]).reshape(-1, 2)
        x, y = (points.min(0) + points.max(0)) / 2
        assert (x - x0) / (x1 - x0) == pytest.approx(confidence, abs=1e-3)
        assert (y - y0) / (y1 - y0) == pytest.approx(accuracy, abs=1e-3)
        sizes.append(np.ptp(points[:, 0]))
    assert np.argsort(sizes).tolist() == np.argsort(count[:4]).tolist()


def test_map_is_drawn_to_scale(seed: int) -> None:
    """Check that points are in the color of their class, shifted and scaled alike in both axes."""
    rng = np.random.default_rng(seed)
    label = np.repeat(np.arange(14), rng.permutation(np.arange(5, 19)))
    given = points(rng, label, [f"{EVIL} {i}" for i in range(14)])
    pairs = rng.integers(len(label), size=(500, 2))
    page = str(embedding_map(dataclasses.replace(given, pairs=pairs)))
    assert "<img" not in page
    drawn: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for kind, path in re.findall(r'<path class="(\w+)" d="([^"]*)"', page):
        drawn[kind] += [(int(x), int(y)) for x, y in re.findall(r"M(-?\d+) (-?\d+)h0", path)]
    height = int(re.search(r'viewBox="0 0 1000 (\d+)"', page)[1])  # type: ignore[index]
    most = np.sort(np.argsort(-np.bincount(label), kind="stable")[:10])
    assert [len(drawn[f"c{i}"]) for i in range(10)] == np.bincount(label)[most].tolist()
    assert len(drawn["rest"]) == (~np.isin(label, most)).sum()
    every = np.array([point for kind in drawn for point in drawn[kind]])
    assert every.min() >= 0
    assert (every.max(0) <= [1000, height]).all()
    scale = np.ptp(every, axis=0) / np.ptp(given.xy, axis=0)
    assert scale[0] == pytest.approx(scale[1], rel=0.01)
    for kind, own in [*((f"c{i}", label == c) for i, c in enumerate(most)), ("rest", ~np.isin(label, most))]:
        wanted = (given.xy[own] - given.xy.min(0)) * (scale * [1, -1]) + [every[:, 0].min(), every[:, 1].max()]
        here = np.array(drawn[kind])
        apart = np.abs(wanted[:, None] - here[None]).max(2)
        assert (apart.min(1) < 3).all()
        assert (apart.min(0) < 3).all()
    lines = re.search(r'class="pair" d="([^"]*)"', page)
    assert lines is not None
    assert 100 <= lines[1].count("L") <= 200


@pytest.mark.parametrize("pictures", [1, 2])
def test_choices_are_judged(tmp_path: Path, seed: int, pictures: int) -> None:
    """Check that an instance is right if each image ranks its caption first, and each caption its image."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(4, size=(40, pictures, 2)) / 4  # many ties, which count as wrong
    own = scores[:, np.arange(pictures), np.arange(pictures)]
    right = (own > scores[:, np.arange(pictures), 1 - np.arange(pictures)]).all(1)
    if pictures == 2:
        right &= (own > scores[:, [1, 0], [0, 1]]).all(1)
    images = np.arange(40 * pictures).reshape(40, pictures)
    captions = [[f"caption {i} {place}" for place in "ab"] for i in range(40)]
    found = ChoiceScores(captions, images, scores, picture_of)
    page = write_report(tmp_path, "Orders", [section(result("orders", {"text_score": 0.5}, 40, "choice"), found)])
    shown = page.read_text("utf-8").split("<h3>Examples")[1].split('<span class="verdict')[1:]
    assert len(shown) == min(4, right.sum()) + min(4, (~right).sum())
    for part in shown:
        i = int(re.search(r"caption (\d+) a", part)[1])  # type: ignore[index]
        assert part.startswith(" yes" if right[i] else " no")
        assert [float(x) for x in re.findall(r'class="score own[^"]*">([\d.]+)', part)] == own[i].tolist()
        assert [base64.b64encode(picture_of(int(image))).decode() in part for image in images[i]] == [True] * pictures


def test_clear_differences_name_the_better_model(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a model is better if the interval excludes 0; of errors and ranks, lower is better."""
    given = comparisons(seed)
    text = " ".join(Elements(write_comparison(tmp_path, "Two", given).read_text("utf-8")).text.split())
    print_comparison(given)
    printed = " ".join(capsys.readouterr().out.split())
    for row in (
        "acc1 0.612 0.655 +0.043 +0.011 to +0.075 B better",
        "ece {}0.081 0.062 -0.019 -0.030 to -0.004 B better",
        "image_retrieval_recall@1 0.400 0.380 -0.020 -0.050 to +0.010 {}",
        "median_rank {}2.0 3.0 +1.0 +0.500 to +2.0 A better",
        "mean_average_precision 0.400 0.400 0 0 to 0 {}",
    ):
        on_page = row.format("lower is better " if "k {" in row or row.startswith("ece") else "unclear")
        assert re.sub(r"\s", "", on_page) in re.sub(r"\s", "", text)
        assert row.format("").strip() in printed
    assert printed.count("better") == 3
    assert printed.startswith(f"A runs/{EVIL} B runs/y")
    assert printed.count("incomplete") == 1


def test_comparison_counts_right_answers_and_shows_examples(tmp_path: Path, seed: int) -> None:
    """Check the counts of right answers, and that each gallery holds its own cases only."""
    rng = np.random.default_rng(seed)
    images = 50
    truth, *answers = rng.integers(3, size=(3, images))
    confidence = (np.linspace(0, 0.49, images), np.linspace(0.5, 0.99, images))
    found = TwoAnswers(["cat", "dog", "yak"], truth, (answers[0], answers[1]), confidence, picture_of)
    both = ranked(rng, 2 * images, images), ranked(rng, 2 * images, images)
    captions = [f"caption {i}." for i in range(2 * images)]
    ranks = TwoRankings(captions, np.arange(2 * images) // 2, both, picture_of)
    head = {"n": images, "complete": True, "first": "x", "second": "y", "differences": {}}
    given = [Comparison({"dataset": "a", "kind": "classification", **head}, found)]
    given.append(Comparison({"dataset": "b", "kind": "retrieval", **head}, ranks))
    page = write_comparison(tmp_path, "Two", given).read_text("utf-8")
    parts = re.split("<h3>", page)[1:]
    right = [
        [answer == truth for answer in answers],
        [one.rank_by_text == 0 for one in both],
        [one.rank_by_image == 0 for one in both],
    ]
    assert len(parts) == len(right)
    for kind, (part, (a, b)) in enumerate(zip(parts, right)):
        counts = [int(x) for x in re.findall(r"<b>(\d+)</b></li>", part)]
        assert counts == [(a & b).sum(), (a & ~b).sum(), (b & ~a).sum(), (~a & ~b).sum()]
        galleries = re.split("<h4>", part)[1:]
        for gallery, title, wanted in zip(galleries, ("A right, B wrong", "B right, A wrong"), (a & ~b, b & ~a)):
            assert gallery.startswith(title)
            start, end = ('class="asked">', "</div>") if kind else ('class="case">', 'class="side')
            cases = re.findall(f"{start}(.*?){end}", gallery, re.DOTALL)
            numbers = [case_of(case) for case in cases]
            assert len(set(numbers)) == min(4, wanted.sum())
            assert wanted[numbers].all()
            assert gallery.count("<li") == (0 if kind == 0 else 10 * len(numbers))
            if kind:
                first = [(one.rank_by_text, one.rank_by_image)[kind - 1][numbers] < 5 for one in both]
                assert gallery.count('<li class="right"') == np.sum(first)


def picture_of(i: int) -> bytes:
    return encode(np.full((4, 4, 3), i, np.uint8))


def case_of(text: str) -> int:
    """Return the number of the picture, or of the caption, in a piece of a page."""
    if found := re.search(r"caption (\d+)\.", text):
        return int(found[1])
    data = base64.b64decode(re.search(r"base64,([^\"]*)", text)[1])  # type: ignore[index]
    return int(np.asarray(Image.open(io.BytesIO(data)))[0, 0, 0])


@pytest.mark.parametrize("kind", ["1000 classes", "30 classes", "doctor", "comparison"])
def test_page_in_a_browser(tmp_path: Path, curves: Path, seed: int, kind: str) -> None:
    """Check for console errors, missing pictures and overflow, on a screen and a phone, in light and dark."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here to open the report in")
    from playwright.sync_api import sync_playwright

    if kind == "doctor":
        path = examination(tmp_path / "data", seed)
    elif kind == "comparison":
        path = write_comparison(tmp_path, "Two runs " + "x" * 100, comparisons(seed))
    else:
        given = sections(seed, int(kind.split()[0]), 400)
        path = write_report(tmp_path, "A run", given, {"data": "shards/" + "x" * 200}, curves)
    problems: list[str] = []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width, scheme in ((1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page.on("console", lambda message: problems.append(message.text))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("requestfailed", lambda request: problems.append(request.url))
            page.goto(path.as_uri())
            assert page.evaluate("document.images.length") > 20
            assert page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).length") == 0
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(ENLARGED) == 0
            assert page.evaluate(COVERED) == []
            red, green, blue = map(int, re.findall(r"\d+", page.evaluate(GROUND))[:3])
            assert (red + green + blue > 600) == (scheme == "light")
        assert not problems
        page.emulate_media(media="print")
        assert page.evaluate(GROUND) == "rgb(255, 255, 255)"
        # Control: the checks above find such faults, and the policy of the page still holds.
        page.set_content("<img src='data:image/png;base64,AAAA'><script>document.title = 'run'</script>")
        page.wait_for_function("document.images[0].complete")
        assert page.evaluate("document.images[0].naturalWidth") == 0
        assert len(problems) == 1
        assert "Content Security Policy" in problems[0]
        assert page.title() == ""
        browser.close()


# Pictures that are drawn larger than they are, which blurs them, except the matrix of all classes.
ENLARGED = """[...document.images].filter(i => !i.matches(".overview")
  && (i.width > i.naturalWidth + 1 || i.height > i.naturalHeight + 1)).length"""
# Names on a map that cover each other or lie outside of it.
COVERED = """() => [...document.querySelectorAll(".map")].flatMap(map => {
  const boxes = [...map.querySelectorAll("span")].map(e => [e.textContent, e.getBoundingClientRect()]);
  const whole = map.getBoundingClientRect();
  const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  return boxes.filter(([name, a], i) => boxes.slice(i + 1).some(([_, b]) => meet(a, b)) || a.left < whole.left - 1
    || a.right > whole.right + 1 || a.top < whole.top - 1 || a.bottom > whole.bottom + 1).map(([name]) => name);
})"""
GROUND = "getComputedStyle(document.body).backgroundColor"
