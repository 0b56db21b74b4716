"""The report: what stands in it, that nothing in it can run, and how it looks in a real browser."""

import html
import json
import re
import shutil
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import caption, encode, smooth, write_benchmark, write_tar

from dualenc.data.doctor import examine
from dualenc.embedder import score_retrieval
from dualenc.evaluation import classification_metrics, predictions
from dualenc.report import Classes, Labels, Section, write_examination, write_json, write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<script>document.title='x'</script><img src=x onerror=alert(1)> & \"quotes\" ' {{ 7 * 7 }}"


def result(dataset: str, metrics: dict[str, float], n: int = 100) -> dict[str, Any]:
    return {
        "dataset": dataset, "model": "runs/x", "n": n, "complete": True, "metrics": metrics,
        "intervals": {name: [0.9 * value, min(1.0, 1.1 * value)] for name, value in metrics.items()},
        "chance": dict.fromkeys(metrics, 0.01),
    }  # fmt: skip


def sections(seed: int, classes: int = 12, images: int = 60) -> list[Section]:
    """One set of each kind, with pictures, from random embeddings that are often right."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    pictures = [encode(smooth(rng, 40, 60), "jpeg") for _ in range(images)]

    def unit(n: int) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(n, 16, generator=generator), dim=1)

    classifier, targets = unit(classes), torch.randint(classes, (images,), generator=generator)
    image = torch.nn.functional.normalize(classifier[targets] + 1.5 * unit(images), dim=1)
    found = classification_metrics(image, classifier, targets)
    taken = predictions(image, classifier, targets, found.ranks["image"])
    names = [EVIL if i == 0 else f"class {i} with a long name" for i in range(classes)]
    intervals = {name: list(bounds) for name, bounds in found.intervals.items()}
    scores = {"intervals": intervals, "chance": found.chance, "metrics": found.metrics}
    zeroshot = Section(
        {**result("photos", {}, images), **scores}, Classes(names, targets.numpy(), taken.numpy(), pictures.__getitem__)
    )
    owner = torch.arange(images).repeat_interleave(2)
    text = torch.nn.functional.normalize(image[owner] + 1.5 * unit(2 * images), dim=1)
    captions = [EVIL if i % 4 == 0 else caption(rng) for i in range(2 * images)]
    retrieval = score_retrieval("pairs", image, text, captions, owner, pictures.__getitem__, "runs/x")
    labels = Section(
        result("labels", {"mean_average_precision": 0.4}), Labels(names, np.arange(classes), np.linspace(0, 1, classes))
    )
    return [zeroshot, retrieval, labels]


def examination(folder: Path, seed: int) -> Path:
    """The page on shards with something of everything, keys and captions that are out for harm, and a leak."""
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
    """What a browser would build of the page."""

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


def test_nothing_in_it_runs_or_loads(tmp_path: Path, curves: Path, seed: int) -> None:
    page = write_report(tmp_path, f"A run {EVIL}", sections(seed), {"data": EVIL}, curves).read_text("utf-8")
    found = Elements(page)
    assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & set(found.tags)
    assert not found.handlers
    assert all(source.startswith(("data:image/", "#")) for source in found.sources)
    assert found.tags.count("img") > 20
    assert "onerror=alert(1)" in found.text  # shown as it was written
    assert "49" not in re.findall(r"quotes&#34; &#39; (.*?)<", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert html.unescape(policy[1]).startswith("default-src 'none'")
    assert "script" not in policy[1]


def test_nothing_in_the_doctors_page_runs_or_loads(tmp_path: Path, seed: int) -> None:
    found = Elements(examination(tmp_path / "data", seed).read_text("utf-8"))
    assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & set(found.tags)
    assert not found.handlers
    assert all(source.startswith(("data:image/", "#")) for source in found.sources)
    assert found.tags.count("img") > 20
    assert found.tags.count("svg") > 4
    assert found.text.count("onerror=alert(1)") > 4  # in keys and captions, shown as they were written
    for title in ("The smallest images", "Equal images", "In other too", "The most frequent captions", "cut at 5"):
        assert title in found.text


def test_figures_stand_in_it(tmp_path: Path, curves: Path, seed: int) -> None:
    given = sections(seed)
    text = " ".join(Elements(write_report(tmp_path, "A run", given, None, curves).read_text("utf-8")).text.split())
    for section in given:
        for name, value in section.result["metrics"].items():
            assert name in text
            if name != "median_rank":
                assert f"{value:.3f}" in text
        assert section.result["dataset"] in text
    assert "held-out pairs" in text  # a plot's title
    write_json(tmp_path, "zeroshot", [section.result for section in given])
    assert json.loads((tmp_path / "zeroshot.json").read_text()) == [section.result for section in given]


def test_confusions_are_counted(tmp_path: Path) -> None:
    """Three cats taken for dogs and one dog for a cat, of four and two; and a class without images."""
    picture = encode(np.zeros((8, 8, 3), np.uint8))
    truth, taken = np.array([0, 0, 0, 0, 1, 1]), np.array([1, 1, 1, 0, 0, 1])
    found = Classes(["cat", "dog", "yak"], truth, taken, lambda i: picture)
    page = write_report(tmp_path, "Pets", [Section(result("pets", {"acc1": 1 / 3}, 6), found)])
    text = re.sub(r"\s", "", Elements(page.read_text("utf-8")).text)
    first, second = text.index("cattakenfordog3of4images"), text.index("dogtakenforcat1of2images")
    assert first < second
    assert "1classhasnoimages" in text
    assert "cat0.250of4" in text
    assert "dog0.500of2" in text


@pytest.mark.parametrize("kind", ["1000 classes", "30 classes", "doctor"])
def test_in_a_browser(tmp_path: Path, curves: Path, seed: int, kind: str) -> None:
    """No console error, every picture loaded, nothing wider than a phone; looked at by day and by night."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here to open the report in")
    from playwright.sync_api import sync_playwright

    if kind == "doctor":
        path = examination(tmp_path / "data", seed)
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
            red, green, blue = map(int, re.findall(r"\d+", page.evaluate(GROUND))[:3])
            assert (red + green + blue > 600) == (scheme == "light")
            page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
        assert not problems
        page.emulate_media(media="print")
        assert page.evaluate(GROUND) == "rgb(255, 255, 255)"
        # The control: what the checks above look for is found where it is, and the page's policy still holds.
        page.set_content("<img src='data:image/png;base64,AAAA'><script>document.title = 'run'</script>")
        page.wait_for_function("document.images[0].complete")
        assert page.evaluate("document.images[0].naturalWidth") == 0
        assert len(problems) == 1
        assert "Content Security Policy" in problems[0]
        assert page.title() == ""
        browser.close()


GROUND = "getComputedStyle(document.body).backgroundColor"
