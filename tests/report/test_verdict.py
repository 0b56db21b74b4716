"""Verdicts in words follow from intervals, and from chance, a baseline or the other model."""

import re
from typing import Any

import numpy as np
import pytest

from dualenc.report import Comparison, Description, Section, print_comparison, print_table, verdict, verdict_on_two
from dualenc.report.html import write_comparison, write_report
from dualenc.report.verdict import side

ACCURACY = Description("images", "", ("acc1",))
RANK = Description("images", "", ("median_rank",))


def result(name: str, interval: tuple[float, float], chance: float, n: int = 100, **more: Any) -> dict[str, Any]:
    return {
        "dataset": "pets", "kind": "x", "model": "runs/x", "n": n, "complete": True, "problems": [],
        "metrics": {name: sum(interval) / 2}, "intervals": {name: list(interval)}, "chance": {name: chance}, **more,
    }  # fmt: skip


def two(name: str, difference: float, interval: tuple[float, float]) -> dict[str, Any]:
    return {
        "dataset": "pets", "kind": "x", "n": 100, "complete": True, "first": "runs/x", "second": "runs/y",
        "differences": {name: [0.5, 0.5 + difference, difference, *interval]},
    }  # fmt: skip


def test_verdict_follows_from_interval_and_chance(seed: int) -> None:
    """A metric is above chance if all of its interval is, and not above it if the interval contains chance."""
    rng = np.random.default_rng(seed)
    seen = set()
    for one, other, chance in rng.random((300, 3)):
        low, high = sorted((one, other))
        words = "above" if low > chance else "below" if high < chance else "not above"
        seen.add(words)
        assert verdict(result("acc1", (low, high), chance), ACCURACY).startswith(f"acc1 is {words} chance: ")
        lower = {"above": "worse than", "below": "better than", "not above": "not better than"}[words]
        text = verdict(result("median_rank", (low, high), chance), RANK)
        assert text.startswith(f"median_rank is {lower} chance: ")  # lower is better
        named = verdict(result("acc1", (low, high), chance, baseline="the most frequent label"), ACCURACY)
        assert named.startswith(f"acc1 is {words} the baseline: ")
        assert "the most frequent label gives" in named
        assert "chance" not in named
    assert seen == {"above", "below", "not above"}
    at_bound = result("acc1", (0.1, 0.2), 0.1)
    assert verdict(at_bound, ACCURACY).startswith("acc1 is not above chance")


def test_equal_outcomes_are_judged_by_how_many_there_are(seed: int) -> None:
    """N right answers of n are above chance only if they are rare by chance; the same holds for none of n."""
    rng = np.random.default_rng(seed)
    for n, chance in zip(rng.integers(1, 40, 200).tolist(), rng.uniform(0.01, 0.99, 200).tolist()):
        assert side((1.0, 1.0), chance, n, True) == ("above" if chance**n < 0.025 else "not above")
        assert side((0.0, 0.0), chance, n, True) == ("below" if (1 - chance) ** n < 0.025 else "not above")
    assert side((0.3, 0.3), 0.1, 1000, True) == ""  # one image for each class: nothing could move
    assert side((0.2, 0.2), 0.2, 1000, True) == "not above"


def test_no_verdict_without_interval_chance_or_headline() -> None:
    whole = result("acc1", (0.3, 0.4), 0.1)
    assert verdict(whole, ACCURACY)
    for part in ("intervals", "chance"):
        assert verdict({**whole, part: {}}, ACCURACY) == ""
    assert verdict(whole, Description("images")) == ""


def test_verdict_on_two_names_the_better_model(seed: int) -> None:
    """The second is better if the interval lies above 0, of ranks below 0; else the difference is not clear."""
    rng = np.random.default_rng(seed)
    for low, value, high in np.sort(rng.uniform(-0.9, 0.9, (200, 3)), axis=1):
        text = verdict_on_two(two("acc1", value, (low, high)), ACCURACY)
        ranks = verdict_on_two(two("median_rank", value, (low, high)), RANK)
        if low <= 0 <= high:
            assert "no clear difference" in text
            assert "no clear difference" in ranks
            continue
        better = "the second model (B) is better than the first (A) by "
        worse = "the first model (A) is better than the second (B) by "
        assert (better if low > 0 else worse) in text
        assert (worse if low > 0 else better) in ranks
        size, least, most = (float(x) for x in text.partition(" by ")[2].replace(",", " ").replace("to", " ").split())
        assert size == pytest.approx(abs(value), abs=6e-4)
        assert (least, most) == pytest.approx(sorted((abs(low), abs(high))), abs=6e-4)
    assert "no clear" in verdict_on_two(two("acc1", 0.2, (0.2, 0.2)), ACCURACY)  # nothing could move
    assert "second model (B) is better" in verdict_on_two(two("acc1", 1.0, (1.0, 1.0)), ACCURACY)
    assert verdict_on_two(two("acc1", 0.2, (0.1, 0.3)), RANK) == ""


def test_verdict_notes_and_prompts_stand_on_the_page_and_under_the_table(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = ["one class <b>means nothing", "and \x1b[2J more"]
    one = result("acc1", (0.05, 0.2), 0.1, notes=notes, prompts="80 templates <i>")
    one["verdict"] = verdict(one, ACCURACY)
    page = write_report(tmp_path / "a", "Pets", [Section(one, description=ACCURACY)]).read_text("utf-8")
    for text in (one["verdict"], "one class &lt;b&gt;means nothing", "prompts: 80 templates &lt;i&gt;"):
        assert f"{text}<" in page, text
    assert '<span class="verdict soft">not above chance</span>' in page
    print_table([one])
    printed = capsys.readouterr().out
    for text in (one["verdict"], notes[0], "prompts: 80 templates <i>"):
        assert f"\npets: {text}\n" in printed, text
    assert "\x1b" not in printed

    assert "model: <code>" not in page
    models = [one, {**one, "model": "runs/y"}]
    sections = [Section(part, description=ACCURACY) for part in models]
    page = write_report(tmp_path / "c", "Pets", sections).read_text("utf-8")
    assert [page.count(f"model: <code>{name}</code>") for name in ("runs/x", "runs/y")] == [1, 1]
    print_table(models)
    printed = capsys.readouterr().out
    for model in ("runs/x", "runs/y"):
        assert f"\npets, {model}: {one['verdict']}\n" in printed
    assert printed.count("one class") == printed.count("prompts:") == 1

    both = two("acc1", 0.2, (0.1, 0.3))
    both["verdict"] = verdict_on_two(both, ACCURACY)
    comparison = Comparison(both, description=ACCURACY)
    assert f"<p>{both['verdict']}</p>" in write_comparison(tmp_path / "b", "Two", [comparison]).read_text("utf-8")
    print_comparison([comparison])
    assert f"\npets: {both['verdict']}\n" in capsys.readouterr().out


def test_a_baseline_is_called_so(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    one = result("acc1", (0.3, 0.4), 0.1, baseline="the most frequent label")
    page = write_report(tmp_path, "Pets", [Section(one, description=ACCURACY)]).read_text("utf-8")
    body = page[page.index("<body>") : page.index("<footer")]
    card, rest = body.split("<dl>")
    assert "baseline 0.100" in card
    assert "above the baseline" in card
    assert "baseline: the most frequent label" in rest
    assert '<th class="figure">baseline</th>' in rest
    assert not re.search(r"\bchance [\d]|>chance|chance<", body)
    print_table([one])
    assert capsys.readouterr().out.splitlines()[0].split()[-1] == "baseline"
    print_table([one, result("acc1", (0.3, 0.4), 0.1)])
    assert capsys.readouterr().out.splitlines()[0].endswith("chance or baseline")
