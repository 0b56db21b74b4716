"""The page of a filter: its figures against brute force, on drawn shards, scores and rules."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import write_benchmark, write_shards, write_tar

from dualenc.curation.filter import FilterResult, FilterRule, Leak
from dualenc.curation.report import find_groups, write_report
from dualenc.data import ShardIndex


class Page(HTMLParser):
    """Tables, texts and pictures of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.pictures, self.open = 0, 0
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.pictures += tag == "img"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def draw(folder: Path, seed: int, **changes: Any) -> FilterResult:
    """Return a result of a filter on shards, of which some samples are broken, and its evaluation set."""
    rng = np.random.default_rng(seed)
    write_shards(folder / "shards", [30, 25], seed)
    write_tar(folder / "shards" / "z.tar", [{"__key__": "<b>bad</b>", "png": b"x", "txt": b"<script>"}])
    index = ShardIndex.build(str(folder / "shards"))
    n = len(index)
    score = rng.normal(0.3, 0.1, n).astype(np.float32)
    score[rng.random(n) < 0.1] = np.nan
    score[-1] = 0.99  # the broken sample is among the best
    duplicate, similarity = np.full(n, -1.0), np.full(n, np.nan)
    for i in range(1, n):
        if rng.random() < 0.5:
            duplicate[i], similarity[i] = rng.integers(i), rng.uniform(0.8, 1)
    columns = {
        "key": np.array([index.key(i) for i in range(n)], object),
        "clip_score": score,
        "clip_score_2": rng.normal(0.3, 0.1, n).astype(np.float32),
        "tokens": rng.integers(2, 30, n).astype(np.float64),
        "duplicate_row": duplicate,
        "duplicate_similarity": similarity,
    }
    rules = [
        FilterRule(name="clip_score > <i>0.2", kept=np.nan_to_num(score, nan=-1) > 0.2),
        FilterRule(name="tokens in 3..20", kept=columns["tokens"] <= 20),
        FilterRule(name="dedup < 0.9", kept=~(np.nan_to_num(similarity) >= 0.9)),
    ]
    kept = np.all([rule.kept for rule in rules], axis=0)
    sets = write_benchmark(folder / "set", seed, "retrieval")
    leaks = [
        Leak(row=i, set=str(sets), item=i % 7, key=f"s{i}", similarity=0.9 + i / 1000, equal=i % 2 == 0)
        for i in range(5)
    ]
    found = FilterResult(folder / "scores", index, columns, rules, kept, leaks, {"dedup": 0.9, "against": 0.95})
    return replace(found, **changes)


def test_the_figures_of_rules_are_counts(tmp_path: Path, seed: int) -> None:
    result = draw(tmp_path, seed)
    page = Page(write_report(result, tmp_path / "page"))
    rows = {row[0]: row[1:] for row in page.rows}
    for rule in result.rules:
        others = [other.kept for other in result.rules if other is not rule]
        alone = [i for i in range(len(result.kept)) if not rule.kept[i] and all(kept[i] for kept in others)]
        removed = [i for i in range(len(result.kept)) if not rule.kept[i]]
        assert (rows[rule.name][0], rows[rule.name][2]) == (str(len(removed)), str(len(alone)))
    assert rows["all together"][0] == str(int((~result.kept).sum()))
    text = (tmp_path / "page" / "report.html").read_text("utf-8")
    assert "<script>" not in text
    assert "<i>0.2" not in text
    assert "&lt;script&gt;" in text  # the caption of the broken sample, which has no picture
    assert "no picture" in text
    assert not re.search(r"(src|href)=.(?!data:|#)", text)


def test_the_agreement_of_two_scores(tmp_path: Path, seed: int) -> None:
    """Compare with ranks by brute force and with the extremes: the same order, and the opposite order."""
    result = draw(tmp_path, seed)
    first, second = result.columns["clip_score"], result.columns["clip_score_2"]
    rows = [i for i in range(len(first)) if np.isfinite(first[i])]
    top = round(0.3 * len(rows))
    best = [set(sorted(rows, key=lambda i: values[i])[-top:]) for values in (first, second)]
    text = " ".join(Page(write_report(result, tmp_path / "page")).texts)
    assert f"Of the {top} best pairs by each, {len(best[0] & best[1])} are the same" in text
    for sign, correlation, same in ((1, "1.000", top), (-1, "-1.000", 0)):
        other = replace(result, columns={**result.columns, "clip_score_2": sign * first})
        text = " ".join(Page(write_report(other, tmp_path / "page")).texts)
        assert f"rank correlation of {correlation}" in text
        assert f"Of the {top} best pairs by each, {same} are the same" in text


def test_groups_of_duplicates_are_connected(seed: int) -> None:
    """Chains of any length are one group; links that do not count separate them."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        n = int(rng.integers(1, 60))
        # A duplicate ranks before its row, which gives the links an order, though not that of the rows.
        order, duplicate = rng.permutation(n), np.full(n, -1)
        for place in range(1, n):
            if rng.random() < 0.7:
                duplicate[order[place]] = order[rng.integers(place)]
        linked = rng.random(n) < 0.7
        label = list(range(n))
        for _ in range(n):
            for row in range(n):
                if linked[row] and duplicate[row] >= 0:
                    label[row] = label[duplicate[row]]
        wanted = {frozenset(i for i in range(n) if label[i] == one) for one in label}
        found = find_groups(duplicate, linked)
        assert {frozenset(group.tolist()) for group in found} == {group for group in wanted if len(group) > 1}
        assert [len(group) for group in found] == sorted(map(len, found), reverse=True)


def test_sections_that_have_nothing_are_left_out(tmp_path: Path, seed: int) -> None:
    whole = write_report(draw(tmp_path, seed), tmp_path / "page").read_text("utf-8")
    for section in ("Near duplicates", "Pictures of evaluation sets", "and clip_score_2", "Pairs by their score"):
        assert section in whole
    kept = np.ones(56, bool)
    bare = draw(
        tmp_path / "bare", seed, columns={"key": np.zeros(56, object)}, rules=[], kept=kept, leaks=[], threshold={}
    )
    page = write_report(bare, tmp_path / "page").read_text("utf-8")
    for section in ("Near duplicates", "Pictures of evaluation sets", "clip_score", "Before and after"):
        assert section not in page


@pytest.mark.parametrize("broken", [0, 1])
def test_leaks_are_side_by_side_with_the_picture_of_the_set(tmp_path: Path, seed: int, broken: int) -> None:
    """A set that is gone gives no pictures, and the page is still written."""
    result = draw(tmp_path, seed)
    leaks = [leak._replace(set=str(tmp_path / "gone")) for leak in result.leaks]
    none = Page(write_report(replace(result, leaks=[]), tmp_path / "none"))
    page = Page(write_report(replace(result, leaks=leaks if broken else result.leaks), tmp_path / "page"))
    assert page.pictures - none.pictures == (5 if broken else 10)
    assert "3 pairs are the same file" in " ".join(page.texts)
