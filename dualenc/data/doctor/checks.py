"""What would hurt a run, found before it: shards in, an `Examination` out.

The headers of all shards are read. Of the pairs, some drawn by a seed or all are looked at by `survey`.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from braceexpand import braceexpand

from dualenc.data.doctor.scan import Survey, survey
from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet, Problem
from dualenc.data.images import IMAGE_EXTENSIONS, thumbnail
from dualenc.data.loading.bad_samples import MAX_CONSECUTIVE, BadSampleLog
from dualenc.data.pairs import captions_of, check_captions, decode_sample
from dualenc.data.shards.index import Sample, ShardIndex, distinct, expand_shards
from dualenc.data.shards.shard import content_hash
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.utils.errors import DataError
from dualenc.utils.text import printable, quoted
from dualenc.utils.urls import shown

TINY_SIDE = 32  # pixels of the shorter side
LONG = 5  # times the shorter side: the middle square shows less than a fifth
MANY_PIXELS = 25_000_000  # a photo of 6,000 x 4,000 is below
WASTED_SIDE = 512  # pixels of the shorter side, of half of the images
OFTEN = 0.01  # of images, captions or tokens: repeated, cut or unknown ones above are a warning
SHOWN = 20  # examples kept of a finding on samples; for shards all of them

_QUANTILES = {"least": 0.0, "1%": 0.01, "25%": 0.25, "median": 0.5, "75%": 0.75, "99%": 0.99, "most": 1.0}

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        severity: "error" where a run would not start or would stop, "warning" for what hurts it.
        what: is the matter.
        count, of: how many, of how many that were looked at.
        unit: of what.
        examples: some of them, for shards all; printable.
        advice: what to do about it.
        estimate: about how many of all pairs, and the 95% interval; absent where all were looked at, and for what
            some cannot tell of all, such as duplicates.
    """

    severity: Severity
    what: str
    count: int
    of: int
    unit: str
    examples: list[str]
    advice: str
    estimate: tuple[int, int, int] | None = None


Group = list[tuple[str, Sample]]  # samples to be seen together, each with what to say of it


@dataclass
class Examination:
    """What `examine` found.

    Attributes:
        facts: figures by name, as JSON has them.
        findings: the worst first.
        distributions: an array for each figure of which the facts hold quantiles.
        galleries: groups of samples by title.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    distributions: dict[str, np.ndarray] = field(default_factory=dict)
    galleries: dict[str, list[Group]] = field(default_factory=dict)

    def result(self) -> dict[str, Any]:
        """Facts and findings as plain JSON; a finding also has its `share`."""
        findings = [{**asdict(finding), "share": finding.count / max(1, finding.of)} for finding in self.findings]
        return {"facts": self.facts, "findings": findings}

    @staticmethod
    def picture(sample: Sample) -> bytes:
        """A sample of the galleries for a page; see `dualenc.data.images.thumbnail`."""
        return thumbnail(decode_sample(sample))


def examine(
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    captions: str = "txt",
    *,
    sample: int | None = 1000,
    against: Sequence[str | os.PathLike[str]] = (),
    tokenizer: Tokenizer | None = None,
    context_length: int | None = None,
    bad_samples: float = 0.001,
    workers: int = 2,
    seed: int = 0,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Examination:
    """Looks for what would hurt a run on these shards.

    Args:
        shards: as `ShardIndex.build` takes them.
        captions: see `dualenc.data.pairs.captions_of`.
        sample: how many pairs to read and decode, drawn over all shards; None for all. What the tar headers tell is
            of all samples in any case.
        against: evaluation sets in the layout of CLIP_benchmark (the split that an evaluation takes), or shards, whose
            images must not be in these. All of theirs are read.
        tokenizer: measures the captions in tokens, cut at no length; absent, in words.
        context_length: captions of more tokens are counted as cut.
        bad_samples: share of the pairs that the run lets be bad; see `dualenc.data.loading.bad_samples.BadSampleLog`.
        workers: processes that read and decode; 0 for none.
        seed: of the draw.
        track: wraps the loop over chunks of samples, for a progress bar.

    Raises:
        DataError: `captions` is neither "txt" nor "json.FIELD"; none of the shards is there; `against` cannot be read.
    """
    check_captions(captions)
    sets = [_other(data, captions) for data in against]
    found = Examination(findings=[finding for *_, findings in sets for finding in findings])
    paths = _there([shards] if isinstance(shards, str | os.PathLike) else shards, found)
    index = _index(paths, workers, found)
    if index is not None:
        pairs = rows = _pairs(index, captions, found)
        if sample is not None and sample < len(pairs):
            rows = np.sort(np.random.default_rng(seed).choice(pairs, sample, replace=False))
        read = partial(captions_of, source=captions)
        seen = survey(index, rows, read, tokenizer, workers=workers, track=track)
        look = _Look(index, rows, len(pairs), seen, captions, found)
        look.facts("words" if tokenizer is None else "tokens", seed)
        look.bad(bad_samples)
        look.images()
        look.captions(context_length)
        for name, other, lines, _ in sets:
            every = np.arange(len(other))
            look.leaks(name, other, survey(other, every, lines, decode=False, workers=workers, track=track))
    order: list[Severity] = ["error", "warning", "info"]
    found.findings.sort(key=lambda finding: order.index(finding.severity))
    return found


def _other(
    data: str | os.PathLike[str], captions: str
) -> tuple[str, ShardIndex, Callable[[Sample], list[str]] | None, list[Finding]]:
    """Name and index of an evaluation set or of shards, what reads the captions, and what of it cannot be compared."""
    if Path(data).is_dir() and any(Path(data).glob("*/nshards.txt")):
        opened = BenchmarkSet.open(data)
        findings = [_problem(opened.name, problem) for problem in opened.problems]
        return opened.name, opened.index, _lines if opened.kind == "retrieval" else None, findings
    try:
        return shown(os.fspath(data)), ShardIndex.build(data), partial(captions_of, source=captions), []
    except DataError as error:
        raise DataError(f"against: no evaluation set (without <split>/nshards.txt), and as shards: {error}") from None


def _problem(name: str, problem: Problem) -> Finding:
    """Something wrong with an evaluation set, as a finding."""
    count, examples = len(problem.names), list(map(printable, problem.names[:SHOWN]))
    what = f"{printable(problem.what)}, in {printable(name)}"
    return Finding(
        "warning", what, count, count, "places", examples, "what is left of the set is compared and measured"
    )


def _lines(sample: Sample) -> list[str]:
    """The captions of a sample of an evaluation set."""
    return [line for line in sample.read("txt").decode("utf-8", "replace").split("\n") if line.strip()]


# What the headers tell


def _there(parts: Sequence[str | os.PathLike[str]], found: Examination) -> list[str]:
    """The shards that are there; what is named but is not is a finding."""
    paths: list[str] = []
    missing = []
    for part in map(str, parts):
        try:
            patterns = [part] if os.path.exists(part) else list(braceexpand(part))
        except ValueError as error:
            raise DataError(f"shards {shown(part)!r}: {error}") from None
        for pattern in patterns:
            try:
                paths += expand_shards(pattern)
            except DataError as error:
                missing.append(printable(str(error)))
    if not paths:
        raise DataError(missing[0] if missing else "the list of shards is empty")
    if missing:
        advice = "a run would not start: fetch or write them again, or name only the others"
        of = len(paths) + len(missing)
        found.findings.append(Finding("error", "not there", len(missing), of, "shards named", missing, advice))
    named = len(paths)
    paths, twice = distinct(paths)
    if twice:
        advice = "a run would not start: name each once"
        again = list(map(printable, twice))
        found.findings.append(Finding("error", "named twice", len(again), named, "shards named", again, advice))
    return paths


def _index(paths: list[str], workers: int, found: Examination) -> ShardIndex | None:
    """The index of the shards that can be read; the others are a finding."""
    unreadable: list[DataError] = []
    index = ShardIndex.build(paths, unreadable=unreadable, workers=workers)
    found.facts |= {"shards": len(paths), "shards that can be read": len(paths) - len(unreadable)}
    if unreadable:
        advice = (
            "a run would not start: unpack what is compressed, fetch or write the others again, or leave them out; "
            "`tar -tf SHARD` lists what a tar holds"
        )
        bad = [printable(str(error)) for error in unreadable]
        found.findings.append(Finding("error", "cannot be read", len(bad), len(paths), "shards", bad, advice))
    return index if index.parts else None


def _pairs(index: ShardIndex, captions: str, found: Examination) -> np.ndarray:
    """The rows that have an image and a caption file; the others are findings."""
    samples, empty = len(index), [printable(path) for path, n in zip(index.shards, index.counts()) if not n]
    if empty:
        advice = "leave them out, or write them again"
        found.findings.append(
            Finding("warning", "no sample in it", len(empty), len(index.shards), "shards", empty, advice)
        )
    member = captions.partition(".")[0]
    image, text = index.having(IMAGE_EXTENSIONS), index.having([member])
    both = np.flatnonzero(image & text)
    for has, what, wanted in ((image, "image", f".{', .'.join(IMAGE_EXTENSIONS)}"), (text, "caption", f".{member}")):
        if len(lacking := np.flatnonzero(~has)):
            some = [index[int(row)] for row in lacking[:SHOWN]]
            examples = [f"{_name(one)} has {quoted(', '.join(sorted(one.members)))}" for one in some]
            advice = f"left out: wanted is {wanted}"
            if what == "caption":
                advice += "; --captions says where captions are"
            found.findings.append(Finding("warning", f"no {what}", len(lacking), samples, "samples", examples, advice))
    if not len(both):
        advice = "a run would not start: see what is lacking, and --captions"
        found.findings.append(Finding("error", "no pair of image and caption", samples, samples, "samples", [], advice))
    found.facts |= {
        "samples": samples,
        "pairs": len(both),
        "bytes": sum(part.facts["size"] for part in index.parts),
        "images": {name: int(n) for name in IMAGE_EXTENSIONS if (n := index.having([name]).sum())},
    }
    return both


# What reading tells


@dataclass
class _Look:
    """Findings on the pairs that were looked at, which are `rows` of an index, out of `total`."""

    index: ShardIndex
    rows: np.ndarray
    total: int
    seen: Survey
    source: str
    found: Examination

    def __post_init__(self) -> None:
        self.some = len(self.rows) < self.total
        self.decoded = np.flatnonzero(self.seen.shape[:, 0])  # places among the rows

    def facts(self, unit: str, seed: int) -> None:
        width, height = self.seen.shape[self.decoded].T
        short, long = np.minimum(width, height), np.maximum(width, height)
        self.found.distributions = {
            "width": width,
            "height": height,
            "shorter side": short,
            "longer / shorter side": long / short,
            "bytes of an image": self.seen.size[self.seen.size > 0],
            f"{unit} of a caption": self.seen.length,
            "captions of a sample": np.unique(self.seen.owner, return_counts=True)[1],
            "samples of a shard": np.array(self.index.counts()),
        }
        quantiles = {
            name: {label: float(np.quantile(values, q)) for label, q in _QUANTILES.items()}
            for name, values in self.found.distributions.items()
            if len(values)
        }
        about = {"looked at": len(self.rows), "seed": seed if self.some else None, "captions": len(self.seen.caption)}
        self.found.facts |= {**about, "quantiles": quantiles, "against": []}

    def add(
        self,
        severity: Severity,
        what: str,
        count: int,
        examples: list[str],
        advice: str,
        of: tuple[int, str] | None = None,
    ) -> None:
        """A finding on pairs, where of all as large a share is to be expected; or on something else, without that."""
        number, unit = of or (len(self.rows), "pairs")
        about = estimate(count, number, self.total) if self.some and of is None else None
        unit += " looked at" if self.some else ""
        self.found.findings.append(Finding(severity, what, count, number, unit, examples, advice, about))

    def sample(self, place: Any) -> Sample:
        return self.index[int(self.rows[place])]

    def bad(self, budget: float) -> None:
        """Pairs that a run cannot use, by cause, and whether there are more than it goes on with."""
        problems = self.seen.problems
        advice = "a run takes another pair instead: make the shards again without these"
        for cause, count in Counter(cause for _, cause, _ in problems).most_common():
            some = [(row, detail) for row, other, detail in problems if other == cause][:SHOWN]
            examples = [_name(self.index[row]) + (f": {printable(detail)}" if detail else "") for row, detail in some]
            self.add("warning", printable(cause), count, examples, advice)
        rows = sorted({row for row, _, _ in problems})
        bad, most = len(rows), BadSampleLog(self.total, budget=budget).limit
        about, _, high = estimate(bad, len(self.rows), self.total) if self.some else (bad, bad, bad)
        advice = f"a run stops at more than {most:,} of all {self.total:,} pairs: data.bad_samples"
        if about > most:
            self.add("error", "bad for any cause, and a run would stop", bad, [], advice)
        elif high > most:
            what = "bad for any cause" if bad else "none of those looked at is bad, but that does not tell of all"
            self.add("warning" if bad else "info", what, bad, [], f"{advice}; run with --all to be sure")
        # Places that lie next to each other where all between them are bad.
        places = np.searchsorted(self.rows, rows)
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        longest = max(runs, key=len)
        if not self.some and len(longest) >= MAX_CONSECUTIVE:
            examples = [_name(self.sample(place)) for place in (longest[0], longest[-1])]
            advice = "a run stops there, whatever data.bad_samples says"
            self.add("error", "bad one after the other", len(longest), examples, advice)

    def images(self) -> None:
        width, height = self.seen.shape.T
        short, ratio = np.minimum(width, height), np.maximum(width, height) / np.maximum(1, np.minimum(width, height))
        checks = [
            (f"side below {TINY_SIDE} pixels", short < TINY_SIDE, "most of what is seen is made up by the resize"),
            (f"longer than {LONG} times its width or height", ratio > LONG, "the square that is cut out shows little"),
            (f"more than {MANY_PIXELS:,} pixels", width * height > MANY_PIXELS, "slow to decode: `dualenc shrink`"),
            ("of one color", self.seen.plain, "as sites give for a picture that is gone: leave them out"),
        ]
        for what, which, advice in checks:
            if len(places := self.decoded[which[self.decoded]]):
                examples = [f"{_name(self.sample(i))}: {width[i]:,} x {height[i]:,}" for i in places[:SHOWN]]
                self.add("warning", f"image {what}", len(places), examples, advice)
        wasted = short > WASTED_SIDE
        if 2 * wasted.sum() > len(self.decoded):
            what = f"image with both sides above {WASTED_SIDE} pixels"
            self.add("info", what, int(wasted.sum()), [], "`dualenc shrink` makes decoding several times as fast")
        usual = np.median(short[self.decoded]) if len(self.decoded) else 0
        for title, by, which in (
            ("The smallest images", short, short < usual),
            ("The longest images", -ratio, ratio > 2),
        ):
            some = self.decoded[which[self.decoded]]
            first = some[np.argsort(by[some], kind="stable")[:6]]
            self.found.galleries[title] = [[(f"{width[i]:,} x {height[i]:,}", self.sample(i))] for i in first]
        repeats, groups = _repeats(self.seen.image[self.decoded])
        same = [(n, [self.sample(self.decoded[i]) for i in places]) for n, places in groups]
        if repeats:
            self.add(
                "warning" if repeats > OFTEN * len(self.decoded) else "info",
                f"image with the very bytes of an earlier one{self._only()}",
                repeats,
                [f"{n:,} times: {', '.join(map(_name, some))}" for n, some in same],
                "equal ones in a batch count as wrong answers to each other: keep one, with all captions in its .json",
                (len(self.decoded), "images"),
            )
        self.found.galleries["Equal images"] = [[(quoted(one.key), one) for one in some] for _, some in same[:6]]

    def captions(self, context_length: int | None) -> None:
        seen = self.seen
        of = (len(seen.length), "captions")
        unique = np.unique(np.stack([seen.caption, seen.owner.astype(np.uint64)]), axis=1)  # a sample's own count once
        repeats, groups = _repeats(unique[0])
        often = [{"caption": self._caption(*unique[:, places[0]]), "samples": n} for n, places in groups]
        self.found.facts["most frequent captions"] = often
        if repeats:
            self.add(
                "warning" if repeats > OFTEN * unique.shape[1] else "info",
                f"caption that an earlier sample has too{self._only()}",
                repeats,
                [f"{item['samples']:,} times: {item['caption']}" for item in often],
                "equal ones in a batch count as wrong answers to each other: leave out what does not tell of the image",
                (unique.shape[1], "captions"),
            )
        cut = seen.length > (context_length or np.inf)
        if cut.any():
            enough = int(np.quantile(seen.length, 1 - OFTEN, method="higher"))
            severity = "warning" if cut.sum() > OFTEN * len(cut) else "info"
            examples, advice = self._most(seen.length), f"{enough:,} tokens would leave {1 - OFTEN:.0%} of them whole"
            self.add(severity, f"longer than {context_length:,} tokens, and cut", int(cut.sum()), examples, advice, of)
        if seen.unknown.sum() > OFTEN * seen.length.sum():
            what = f"unknown words, {seen.unknown.sum() / seen.length.sum():.1%} of all tokens"
            advice = "`dualenc tokenizer` trains one on these captions"
            self.add("warning", what, int((seen.unknown > 0).sum()), self._most(seen.unknown), advice, of)

    def leaks(self, name: str, other: ShardIndex, theirs: Survey) -> None:
        """Images and captions that stand in an evaluation set too."""
        name, have = printable(name), np.flatnonzero(theirs.size)
        hashes, first = np.unique(theirs.image[have], return_index=True)
        places = self.decoded[np.isin(self.seen.image[self.decoded], hashes)]
        self.found.facts["against"].append({
            "name": name,
            "images": len(have),
            "of these among those looked at": int(np.isin(theirs.image[have], self.seen.image[places]).sum()),
            "different captions": len(np.unique(theirs.caption)),
            "of these captions in both": int(np.isin(np.unique(theirs.caption), self.seen.caption).sum()),
        })  # fmt: skip
        at = have[first[np.searchsorted(hashes, self.seen.image[places[:SHOWN]])]]
        both = [(self.sample(mine), other[int(its)]) for mine, its in zip(places, at)]
        if both:
            advice = "what is measured there would be learnt by heart: leave these out of the shards"
            examples = [f"{_name(mine)} is {_name(its)}" for mine, its in both]
            self.add("warning", f"image that stands in {name} too", len(places), examples, advice)
        self.found.galleries[f"In {name} too"] = [
            [(f"here: {quoted(mine.key)}", mine), (f"there: {quoted(its.key)}", its)] for mine, its in both[:6]
        ]

    def _only(self) -> str:
        return (
            f", counted among {len(self.rows):,} pairs of {self.total:,} only: --all will find more"
            if self.some
            else ""
        )

    def _caption(self, wanted: np.uint64, row: np.uint64) -> str:
        texts = (text.strip() for text in captions_of(self.index[int(row)], self.source))
        return quoted(next((text for text in texts if content_hash(text.encode()) == wanted), "?"))

    def _most(self, of: np.ndarray) -> list[str]:
        worst = np.argsort(-of, kind="stable")[:SHOWN]
        return [f"{_name(self.index[int(self.seen.owner[i])])}: {of[i]:,}" for i in worst if of[i]]


def _repeats(hashes: np.ndarray) -> tuple[int, list[tuple[int, np.ndarray]]]:
    """How many equal an earlier one; and of the largest groups of equals the size and the first places."""
    _, group, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    largest = [i for i in np.argsort(-counts, kind="stable")[:SHOWN] if counts[i] > 1]
    return len(hashes) - len(counts), [(int(counts[i]), np.flatnonzero(group == i)[:3]) for i in largest]


def estimate(count: int, looked: int, total: int) -> tuple[int, int, int]:
    """About how many of all, and the 95% interval (Wilson 1927), where `looked` of `total` were drawn blindly."""
    share, z2 = count / looked, 1.959964**2
    half = math.sqrt(z2 * (share * (1 - share) / looked + z2 / (4 * looked**2)))
    low, high = (total * (share + z2 / (2 * looked) + sign * half) / (1 + z2 / looked) for sign in (-1, 1))
    return round(share * total), max(count, math.floor(low)), min(total - looked + count, math.ceil(high))


# How things are shown


def _name(sample: Sample) -> str:
    return f"{quoted(sample.key)} in {printable(sample.shard)}"
