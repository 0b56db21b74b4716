"""The checks of `dualenc doctor`, which examine shards for problems that would hurt a run on them.

The tar headers of all shards are read. `survey` then reads and decodes all pairs, or some that are drawn at random.
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

from dualenc.data.doctor.scan import Survey, survey
from dualenc.data.eval_sets.clip_benchmark import BenchmarkSet, Problem
from dualenc.data.eval_sets.shard_sets import caption_lines
from dualenc.data.images import thumbnail
from dualenc.data.loading.bad_samples import MAX_CONSECUTIVE, BadSampleLog
from dualenc.data.pairs import caption_members, captions_of, decode_sample, join_command
from dualenc.data.shards.index import Sample, ShardIndex
from dualenc.data.shards.patterns import SHARDS, Patterns, distinct, find_files
from dualenc.data.shards.shard import IMAGE_EXTENSIONS, content_hash
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.utils.errors import DataError
from dualenc.utils.text import printable, quoted
from dualenc.utils.urls import shown

TINY_SIDE = 32  # pixels; an image with a side below this is a warning
LONG = 5  # ratio of the sides above which the center square shows less than a fifth of an image
MANY_PIXELS = 25_000_000  # more than a photo of 6,000 x 4,000 has
WASTED_SIDE = (
    512  # pixels; more are wasted on usual models, which is noted if half of the images have both sides longer
)
OFTEN = 0.01  # share of images, captions or tokens above which duplicates, truncation or unknown words are a warning
SHOWN = 20  # examples kept of a finding on samples; findings on shards keep all
IN_GALLERY = 6  # images, or groups of equal images, in a gallery of the report

_QUANTILES = {"least": 0.0, "1%": 0.01, "25%": 0.25, "median": 0.5, "75%": 0.75, "99%": 0.99, "most": 1.0}

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """A problem, with the number of times that it occurs.

    Attributes:
        severity: "error" for problems with which a run would not start or would stop, "warning" for those that hurt it.
        what: the problem.
        count: number of times that it occurs.
        of: number of items that were examined.
        unit: name of the items, in the plural.
        examples: printable examples; all of them for shards.
        advice: the way out.
        estimate: estimated number among all pairs, and its 95% interval. Absent where all were examined, and for
            problems whose number cannot be estimated from a sample, such as duplicates.
    """

    severity: Severity
    what: str
    count: int
    of: int
    unit: str
    examples: list[str]
    advice: str
    estimate: tuple[int, int, int] | None = None


Group = list[tuple[str, Sample]]  # samples that the report shows together, each with a label


@dataclass
class Examination:
    """The result of `examine`.

    Attributes:
        facts: figures by name, as in the JSON.
        findings: problems, the worst first.
        distributions: values of each figure whose quantiles are in the facts.
        galleries: groups of samples by title.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    distributions: dict[str, np.ndarray] = field(default_factory=dict)
    galleries: dict[str, list[Group]] = field(default_factory=dict)

    def result(self) -> dict[str, Any]:
        """Return facts and findings as plain JSON; a finding also has its `share`."""
        findings = [{**asdict(finding), "share": finding.count / max(1, finding.of)} for finding in self.findings]
        return {"facts": self.facts, "findings": findings}

    @staticmethod
    def picture(sample: Sample) -> bytes:
        """Encode the image of a gallery's sample for a page; see `dualenc.data.images.thumbnail`."""
        return thumbnail(decode_sample(sample))


def examine(
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    captions: str = "auto",
    *,
    image: str | None = None,
    sample: int | None = 1000,
    against: Sequence[str | os.PathLike[str]] = (),
    tokenizer: Tokenizer | None = None,
    context_length: int | None = None,
    bad_samples: float = 0.001,
    workers: int = 2,
    seed: int = 0,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Examination:
    """Examine shards for problems that would hurt a run on them.

    Args:
        shards: shards as for `ShardIndex.build`.
        captions: source of the captions; see `dualenc.data.pairs.captions_of`.
        image: members that may hold the image; see `dualenc.data.shards.sample.image_members`.
        sample: number of pairs to read and decode, drawn from all shards; None for all. Findings from the tar headers
            are of all samples in any case.
        against: evaluation sets in the layout of CLIP_benchmark (the split that an evaluation uses), or shards, whose
            images must not be in these shards. All of their images are read.
        tokenizer: tokenizer that measures the captions in tokens, without truncation; absent, words are counted.
        context_length: number of tokens above which captions count as truncated.
        bad_samples: share of bad pairs that the run allows; see `dualenc.data.loading.bad_samples.BadSampleLog`.
        workers: number of processes that read and decode; 0 for none.
        seed: seed with which pairs are drawn.
        track: wrapper of the loop over chunks of samples, for a progress bar.

    Raises:
        DataError: If `captions` or `image` is not understood, no shard exists, or `against` cannot be read.
    """
    caption_members(captions)  # raises if it is not understood
    sets = [_open_against(data, captions, image) for data in against]
    found = Examination(findings=[finding for *_, findings in sets for finding in findings])
    paths = _existing_paths(shards, found)
    index = _build_index(paths, image, workers, found)
    if index is not None:
        pairs = rows = _pair_rows(index, captions, found)
        if sample is not None and sample < len(pairs):
            rows = np.sort(np.random.default_rng(seed).choice(pairs, sample, replace=False))
        read = partial(captions_of, source=captions)
        pairs_survey = survey(index, rows, read, tokenizer, workers=workers, track=track)
        checks = _PairChecks(index, rows, len(pairs), pairs_survey, captions, found)
        checks.facts("words" if tokenizer is None else "tokens", seed)
        checks.bad(bad_samples)
        checks.images()
        checks.captions(context_length)
        for name, other, read_other, _ in sets:
            every = np.arange(len(other))
            checks.leaks(name, other, survey(other, every, read_other, decode=False, workers=workers, track=track))
    order: list[Severity] = ["error", "warning", "info"]
    found.findings.sort(key=lambda finding: order.index(finding.severity))
    return found


def _open_against(
    data: str | os.PathLike[str], captions: str, image: str | None
) -> tuple[str, ShardIndex, Callable[[Sample], list[str]] | None, list[Finding]]:
    """Open an evaluation set or shards to compare with.

    Returns:
        The name, the index, the function that reads the captions of a sample, and the problems of the set.
    """
    if Path(data).is_dir() and any(Path(data).glob("*/nshards.txt")):
        opened = BenchmarkSet.open(data)
        findings = [_problem_finding(opened.name, problem) for problem in opened.problems]
        return opened.name, opened.index, caption_lines if opened.kind == "retrieval" else None, findings
    try:
        # Other shards may hold their images in the usual members, and no image at all would look like no leak.
        either = image and f"{image};{';'.join(IMAGE_EXTENSIONS)}"
        return shown(os.fspath(data)), ShardIndex.build(data, image=either), partial(captions_of, source=captions), []
    except DataError as error:
        raise DataError(f"against: not an evaluation set (no <split>/nshards.txt), and as shards: {error}") from None


def _problem_finding(name: str, problem: Problem) -> Finding:
    """Convert a problem of an evaluation set to a finding."""
    count, examples = len(problem.names), list(map(printable, problem.names[:SHOWN]))
    what = f"{printable(problem.what)}, in {printable(name)}"
    return Finding("warning", what, count, count, "places", examples, "the rest of the set is compared and measured")


# Checks of the tar headers


def _existing_paths(shards: Patterns, found: Examination) -> list[str]:
    """Return the shards that exist; shards that are missing or named twice are findings."""
    paths, errors = find_files(shards, SHARDS)
    missing = [printable(str(error)) for error in errors]
    if not paths:
        raise DataError(missing[0] if missing else "the list of shards is empty")
    if missing:
        advice = "a run would not start: download or write them again, or name only the others"
        of = len(paths) + len(missing)
        found.findings.append(Finding("error", "missing", len(missing), of, "shards named", missing, advice))
    named = len(paths)
    paths, twice = distinct(paths)
    if twice:
        advice = "a run would not start: name each shard once"
        examples = list(map(printable, twice))
        found.findings.append(Finding("error", "named twice", len(examples), named, "shards named", examples, advice))
    return paths


def _build_index(paths: list[str], image: str | None, workers: int, found: Examination) -> ShardIndex | None:
    """Build the index of the shards that can be read; the others are a finding."""
    unreadable: list[DataError] = []
    index = ShardIndex.build(paths, image=image, unreadable=unreadable, workers=workers)
    found.facts |= {"shards": len(paths), "shards that can be read": len(paths) - len(unreadable)}
    if unreadable:
        advice = (
            "a run would not start: decompress the compressed ones, download or write the others again, or leave them "
            "out; `tar -tf SHARD` lists the members of a tar"
        )
        bad = [printable(str(error)) for error in unreadable]
        found.findings.append(Finding("error", "cannot be read", len(bad), len(paths), "shards", bad, advice))
    return index if index.parts else None


def _pair_rows(index: ShardIndex, captions: str, found: Examination) -> np.ndarray:
    """Return the rows that have an image and a caption file; the others are findings."""
    samples, empty = len(index), [printable(path) for path, n in zip(index.shards, index.counts()) if not n]
    if empty:
        advice = "leave them out, or write them again"
        found.findings.append(Finding("warning", "no samples", len(empty), len(index.shards), "shards", empty, advice))
    members = caption_members(captions)
    image, text = index.having(index.images), index.having(members)
    both = np.flatnonzero(image & text)
    images = f".{', .'.join(index.images)}; --image names their member"
    for has, what, wanted in (
        (image, "image", images), (text, "caption", f".{' or .'.join(members)}; --captions names their source"),
    ):  # fmt: skip
        if len(lacking := np.flatnonzero(~has)):
            shown_samples = [index[int(row)] for row in lacking[:SHOWN]]
            examples = [f"{_name(sample)} has {quoted(', '.join(sorted(sample.members)))}" for sample in shown_samples]
            advice = f"such samples are left out; expected {wanted}"
            found.findings.append(Finding("warning", f"no {what}", len(lacking), samples, "samples", examples, advice))
    if not len(both):
        way_out = join_command(index, image, text) or (
            "add what is missing, or name what there is with --captions and --image"
        )
        advice = f"a run would not start: {way_out}"
        found.findings.append(Finding("error", "no pair of image and caption", samples, samples, "samples", [], advice))
    found.facts |= {
        "samples": samples,
        "pairs": len(both),
        "bytes": sum(part.facts["size"] for part in index.parts),
        "images": {name: int(n) for name in index.images if (n := index.having([name]).sum())},
    }
    return both


# Checks of the images and captions


@dataclass
class _PairChecks:
    """The checks of the pairs that were read: `rows` of an index, drawn from `total` pairs. Findings go to `found`."""

    index: ShardIndex
    rows: np.ndarray
    total: int
    survey: Survey
    source: str
    found: Examination

    def __post_init__(self) -> None:
        self.sampled = len(self.rows) < self.total
        self.decoded = np.flatnonzero(self.survey.shape[:, 0])  # positions in `rows`

    def facts(self, unit: str, seed: int) -> None:
        """Add figures, and the distributions that they summarize."""
        width, height = self.survey.shape[self.decoded].T
        short, long = np.minimum(width, height), np.maximum(width, height)
        self.found.distributions = {
            "width": width,
            "height": height,
            "shorter side": short,
            "longer / shorter side": long / short,
            "bytes of an image": self.survey.size[self.survey.size > 0],
            f"{unit} of a caption": self.survey.length,
            "captions of a sample": np.unique(self.survey.owner, return_counts=True)[1],
            "samples of a shard": np.array(self.index.counts()),
        }
        quantiles = {
            name: {label: float(np.quantile(values, q)) for label, q in _QUANTILES.items()}
            for name, values in self.found.distributions.items()
            if len(values)
        }
        self.found.facts |= {
            "looked at": len(self.rows),
            "seed": seed if self.sampled else None,
            "captions": len(self.survey.caption),
            "quantiles": quantiles,
            "against": [],
        }

    def add(
        self,
        severity: Severity,
        what: str,
        count: int,
        examples: list[str],
        advice: str,
        of: tuple[int, str] | None = None,
    ) -> None:
        """Add a finding.

        Args:
            severity: see `Finding`.
            what: see `Finding`.
            count: see `Finding`.
            examples: see `Finding`.
            advice: see `Finding`.
            of: number of items that were examined, and their name; absent, the pairs. Only a number of pairs is
                estimated for all pairs.
        """
        number, unit = of or (len(self.rows), "pairs")
        estimated = estimate(count, number, self.total) if self.sampled and of is None else None
        unit += " looked at" if self.sampled else ""
        self.found.findings.append(Finding(severity, what, count, number, unit, examples, advice, estimated))

    def sample(self, position: Any) -> Sample:
        """Return the sample of a position in `rows`."""
        return self.index[int(self.rows[position])]

    def bad(self, budget: float) -> None:
        """Add findings on pairs that a run cannot use: one for each cause, and one if their number would stop the run.

        Args:
            budget: share of bad pairs that the run allows.
        """
        problems = self.survey.problems
        advice = "a run takes another pair instead: make the shards again without these"
        for cause, count in Counter(cause for _, cause, _ in problems).most_common():
            first = [(row, detail) for row, other, detail in problems if other == cause][:SHOWN]
            examples = [_name(self.index[row]) + (f": {printable(detail)}" if detail else "") for row, detail in first]
            if count == len(self.rows) and "field" in cause:
                self.add("error", printable(cause), count, examples, "name one of the fields with --captions")
            else:
                self.add("warning", printable(cause), count, examples, advice)
        rows = sorted({row for row, _, _ in problems})
        bad, most = len(rows), BadSampleLog(self.total, budget=budget).limit
        estimated, _, high = estimate(bad, len(self.rows), self.total) if self.sampled else (bad, bad, bad)
        advice = f"a run stops at more than {most:,} of all {self.total:,} pairs: data.bad_samples"
        if estimated > most:
            self.add("error", "bad in total, and a run would stop", bad, [], advice)
        elif high > most:
            what = "bad in total" if bad else "no bad pair among those looked at, but others may be bad"
            self.add("warning" if bad else "info", what, bad, [], f"{advice}; run with --all to be sure")
        # Bad pairs are consecutive if their positions among the examined pairs are.
        positions = np.searchsorted(self.rows, rows)
        runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
        longest = max(runs, key=len)
        if not self.sampled and len(longest) >= MAX_CONSECUTIVE:
            examples = [_name(self.sample(position)) for position in (longest[0], longest[-1])]
            advice = "a run stops there, whatever data.bad_samples says"
            self.add("error", "bad and consecutive", len(longest), examples, advice)

    def images(self) -> None:
        """Add findings on the size and content of images, and on duplicates."""
        width, height = self.survey.shape.T
        short, ratio = np.minimum(width, height), np.maximum(width, height) / np.maximum(1, np.minimum(width, height))
        checks = [
            (f"side below {TINY_SIDE} pixels", short < TINY_SIDE, "most of the resized image is interpolated"),
            (f"longer than {LONG} times its width or height", ratio > LONG, "the center crop shows little of it"),
            (f"more than {MANY_PIXELS:,} pixels", width * height > MANY_PIXELS, "slow to decode: `dualenc shrink`"),
            ("of one color", self.survey.plain, "often a placeholder of a deleted image: leave them out"),
        ]
        for what, mask, advice in checks:
            if len(positions := self.decoded[mask[self.decoded]]):
                examples = [f"{_name(self.sample(i))}: {width[i]:,} x {height[i]:,}" for i in positions[:SHOWN]]
                self.add("warning", f"image {what}", len(positions), examples, advice)
        wasted = short > WASTED_SIDE
        if 2 * wasted.sum() > len(self.decoded):
            what = f"image with both sides above {WASTED_SIDE} pixels"
            self.add("info", what, int(wasted.sum()), [], "`dualenc shrink` makes decoding several times as fast")
        usual = np.median(short[self.decoded]) if len(self.decoded) else 0
        for title, order, mask in (
            ("The smallest images", short, short < usual),
            ("The longest images", -ratio, ratio > 2),
        ):
            positions = self.decoded[mask[self.decoded]]
            first = positions[np.argsort(order[positions], kind="stable")[:IN_GALLERY]]
            self.found.galleries[title] = [[(f"{width[i]:,} x {height[i]:,}", self.sample(i))] for i in first]
        duplicates, groups = _find_duplicates(self.survey.image[self.decoded])
        equal = [(n, [self.sample(self.decoded[i]) for i in positions]) for n, positions in groups]
        if duplicates:
            self.add(
                "warning" if duplicates > OFTEN * len(self.decoded) else "info",
                f"image identical to an earlier one{self._sampling_note()}",
                duplicates,
                [f"{n:,} times: {', '.join(map(_name, samples))}" for n, samples in equal],
                "duplicates in a batch are false negatives: keep one, with all captions in its .json",
                (len(self.decoded), "images"),
            )
        self.found.galleries["Equal images"] = [
            [(quoted(one.key), one) for one in group] for _, group in equal[:IN_GALLERY]
        ]

    def captions(self, context_length: int | None) -> None:
        """Add findings on duplicate, truncated and unknown captions."""
        lengths, unknown = self.survey.length, self.survey.unknown
        of = (len(lengths), "captions")
        # Equal captions of the same sample count once.
        unique = np.unique(np.stack([self.survey.caption, self.survey.owner.astype(np.uint64)]), axis=1)
        duplicates, groups = _find_duplicates(unique[0])
        frequent = [{"caption": self._caption(*unique[:, first[0]]), "samples": n} for n, first in groups]
        self.found.facts["most frequent captions"] = frequent
        if duplicates:
            self.add(
                "warning" if duplicates > OFTEN * unique.shape[1] else "info",
                f"caption identical to one of an earlier sample{self._sampling_note()}",
                duplicates,
                [f"{item['samples']:,} times: {item['caption']}" for item in frequent],
                "duplicates in a batch are false negatives: leave out captions that do not describe the image",
                (unique.shape[1], "captions"),
            )
        truncated = lengths > (context_length or np.inf)
        if truncated.any():
            enough = int(np.quantile(lengths, 1 - OFTEN, method="higher"))
            severity = "warning" if truncated.sum() > OFTEN * len(truncated) else "info"
            what = f"longer than {context_length:,} tokens, and truncated"
            advice = f"{enough:,} tokens would hold {1 - OFTEN:.0%} of them"
            self.add(severity, what, int(truncated.sum()), self._largest(lengths), advice, of)
        if unknown.sum() > OFTEN * lengths.sum():
            what = f"unknown words, {unknown.sum() / lengths.sum():.1%} of all tokens"
            advice = "`dualenc tokenizer` trains a tokenizer on these captions"
            self.add("warning", what, int((unknown > 0).sum()), self._largest(unknown), advice, of)

    def leaks(self, name: str, other: ShardIndex, theirs: Survey) -> None:
        """Add findings on images and captions that are also in an evaluation set."""
        name, readable = printable(name), np.flatnonzero(theirs.size)
        hashes, first = np.unique(theirs.image[readable], return_index=True)
        positions = self.decoded[np.isin(self.survey.image[self.decoded], hashes)]
        self.found.facts["against"].append({
            "name": name,
            "images": len(readable),
            "of these among those looked at": int(np.isin(theirs.image[readable], self.survey.image[positions]).sum()),
            "different captions": len(np.unique(theirs.caption)),
            "of these captions in both": int(np.isin(np.unique(theirs.caption), self.survey.caption).sum()),
        })  # fmt: skip
        their_rows = readable[first[np.searchsorted(hashes, self.survey.image[positions[:SHOWN]])]]
        both = [(self.sample(position), other[int(row)]) for position, row in zip(positions, their_rows)]
        if both:
            advice = "metrics of that set would measure memorization: leave these out of the shards"
            examples = [f"{_name(ours)} is {_name(their)}" for ours, their in both]
            self.add("warning", f"image that is also in {name}", len(positions), examples, advice)
        self.found.galleries[f"Also in {name}"] = [
            [(f"here: {quoted(ours.key)}", ours), (f"there: {quoted(their.key)}", their)]
            for ours, their in both[:IN_GALLERY]
        ]

    def _sampling_note(self) -> str:
        """Return the end of a message on duplicates, of which few are found if not all pairs are read."""
        if not self.sampled:
            return ""
        return f", counted among {len(self.rows):,} pairs of {self.total:,} only: --all will find more"

    def _caption(self, text_hash: np.uint64, row: np.uint64) -> str:
        """Return the caption of a sample that has this hash."""
        texts = captions_of(self.index[int(row)], self.source)
        return quoted(next((text for text in texts if content_hash(text.encode()) == text_hash), "?"))

    def _largest(self, numbers: np.ndarray) -> list[str]:
        """Return the samples of the captions with the largest numbers, as examples."""
        first = np.argsort(-numbers, kind="stable")[:SHOWN]
        return [f"{_name(self.index[int(self.survey.owner[i])])}: {numbers[i]:,}" for i in first if numbers[i]]


def _find_duplicates(hashes: np.ndarray) -> tuple[int, list[tuple[int, np.ndarray]]]:
    """Count the hashes that equal an earlier one, and find the largest groups of equal ones.

    Returns:
        The number of duplicates, and for each group its size and up to three positions.
    """
    _, group, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    largest = [i for i in np.argsort(-counts, kind="stable")[:SHOWN] if counts[i] > 1]
    return len(hashes) - len(counts), [(int(counts[i]), np.flatnonzero(group == i)[:3]) for i in largest]


def estimate(count: int, sampled: int, total: int) -> tuple[int, int, int]:
    """Estimate a number from a random sample, with its 95% interval (Wilson 1927).

    Args:
        count: number in the sample.
        sampled: size of the sample.
        total: number from which the sample was drawn.

    Returns:
        The estimate, and lower and upper bound of the interval.
    """
    share, z2 = count / sampled, 1.959964**2  # the 97.5% quantile of the normal distribution, squared
    half = math.sqrt(z2 * (share * (1 - share) / sampled + z2 / (4 * sampled**2)))
    low, high = (total * (share + z2 / (2 * sampled) + sign * half) / (1 + z2 / sampled) for sign in (-1, 1))
    return round(share * total), max(count, math.floor(low)), min(total - sampled + count, math.ceil(high))


def _name(sample: Sample) -> str:
    """Return key and shard of a sample, for messages."""
    return f"{quoted(sample.key)} in {printable(sample.shard)}"
