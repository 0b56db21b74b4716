"""Benchmark of a filter: captions of other samples are found by a model that was trained without them, and left out.

A share of the samples gets the texts of others. Models that are trained on a part of these shards score the rest of
them; how well a low score finds the mismatched pairs is compared with the truth. Then models of the same steps are
trained on all noisy pairs, on those that the filter keeps, and on the clean pairs. Each score and each run is a line of
a file: a benchmark that is stopped continues with what is missing.
"""

import io
import json
import resource
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import yaml

import dualenc
from dualenc.curation.filter import filter_table
from dualenc.curation.score import score_shards
from dualenc.data import BenchmarkSet, ShardIndex
from dualenc.data.loading.epoch_plan import permutation
from dualenc.data.pairs import captions_of, only_pairs
from dualenc.evaluation import embed_set, score
from dualenc.inference.embedder import load
from dualenc.utils.files import append_lines, write_text
from tools.bench.quality_sides import RECALLS
from tools.bench.runner import machine, versions

ARMS = ("noisy", "filtered", "clean")
TEXTS = ("txt", "json")  # members that go to another sample


def noise(
    settings: Path,
    evaluation: Path,
    share: float = 0.3,
    folds: int = 3,
    scorer_epochs: float = 30,
    epochs: float = 15,
    seeds: tuple[int, ...] = (0, 1, 2),
    out: Path = Path("runs/bench/noise"),
) -> None:
    """Measure how well a filter finds mismatched captions, and what a model gains from leaving them out.

    Args:
        settings: configuration of a `ContrastiveTask`.
        evaluation: retrieval set on which recall is measured.
        share: share of the samples whose texts are those of another sample.
        folds: parts of the samples; each is scored by a model that was trained on the others.
        scorer_epochs: epochs of these models.
        epochs: epochs of the clean data in the runs that are compared; all of them have the same number of steps.
        seeds: seeds of these runs.
        out: folder for the shards, models and scores, noise.jsonl with a line for each score and run, and noise.md.
    """
    out.mkdir(parents=True, exist_ok=True)
    data = yaml.safe_load(settings.read_text("utf-8"))["data"]["init_args"]
    captions = data.get("captions", "auto")
    index, _ = only_pairs(ShardIndex.build(data["train"]), captions)
    plan = {"settings": str(settings), "evaluation": str(evaluation), "share": share, "folds": folds}
    scoring = {**plan, "scorer_epochs": scorer_epochs}
    mismatched = write_noisy(index, captions, share, folds, out / f"shards-{share:g}-{folds}")
    records = _read(out / "noise.jsonl")
    noisy = out / f"shards-{share:g}-{folds}"
    for fold in range(folds):
        if not _find(records, {**scoring, "fold": fold}):
            found = _score_fold(settings, noisy, fold, folds, scorer_epochs, captions, share, out)
            _note(out, records, {**scoring, "fold": fold, **found})
    kept = [key for fold in range(folds) for key in _find(records, {**scoring, "fold": fold})[0]["kept"]]
    write_text(out / "kept.txt", "".join(f"{key}\n" for key in kept))
    steps = max(1, round(epochs * (len(index) // data["batch_size"])))
    training = {**scoring, "steps": steps}
    for seed in seeds:
        for arm in ARMS:
            if _find(records, {**training, "arm": arm, "seed": seed}):
                continue
            folder = out / f"{arm}-{seed}-{steps}"
            shards = data["train"] if arm == "clean" else str(noisy / "*.tar")
            own = ["--data.select", str(out / "kept.txt")] if arm == "filtered" else []
            length = ["--trainer.max_epochs", "-1", "--trainer.max_steps", str(steps)]
            cpu = _fit(settings, folder, shards, [*length, "--seed_everything", str(seed), *own])
            _note(
                out, records, {**training, "arm": arm, "seed": seed, "recall": _recall(folder, evaluation), "cpu": cpu}
            )
    page = table(records, mismatched, scoring, training)
    write_text(out / "noise.md", page)
    print(page, end="")


def write_noisy(index: ShardIndex, captions: str, share: float, folds: int, out: Path) -> dict[str, bool]:
    """Write the samples of an index into a shard a fold, a share of them with the texts of another; return which.

    Samples are drawn into folds, so that none of them is of one source only. A sample whose new captions are equal to
    its own is not mismatched.

    Args:
        index: index of the samples.
        captions: source of their captions.
        share: share of the samples that get other texts.
        folds: number of folds.
        out: folder of the shards; those that exist are written again, with the same bytes.

    Returns:
        Whether a sample is mismatched, by its key.
    """
    n = len(index)
    order = permutation(n, 0)
    drawn = order[: round(share * n)]
    source = np.arange(n)
    source[drawn] = np.roll(drawn, 1)
    out.mkdir(parents=True, exist_ok=True)
    mismatched = {}
    for fold in range(folds):
        with tarfile.open(out / f"fold-{fold}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for i in np.sort(permutation(n, 1)[fold::folds]).tolist():
                own, other = index[i], index[int(source[i])]
                mismatched[own.key] = captions_of(own, captions) != captions_of(other, captions)
                for sample, wanted in ((own, False), (other, True)):
                    for extension in sample.members:
                        if (extension in TEXTS) == wanted:
                            content = sample.read(extension)
                            info = tarfile.TarInfo(f"{own.key}.{extension}")
                            info.size = len(content)
                            tar.addfile(info, io.BytesIO(content))
    return mismatched


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []


def _find(records: Sequence[dict[str, Any]], plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [record for record in records if plan.items() <= record.items()]


def _note(out: Path, records: list[dict[str, Any]], record: dict[str, Any]) -> None:
    """Append a record to the file and to the list."""
    record = {**record, "date": date.today().isoformat(), "machine": machine(), "versions": versions()}
    append_lines(out / "noise.jsonl", [json.dumps(record)])
    records.append(record)


def _fit(settings: Path, folder: Path, shards: Any, options: Sequence[str]) -> float:
    """Train a model in a program of its own, and return its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shards = shards if isinstance(shards, str) else json.dumps(shards)
    command = [
        sys.executable, "-m", "dualenc", "fit", "--config", str(settings), "--data.train", shards, "--data.val", "null",
        "--trainer.callbacks", "[]", "--trainer.default_root_dir", str(folder), *options,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _score_fold(
    settings: Path, noisy: Path, fold: int, folds: int, epochs: float, captions: str, share: float, out: Path
) -> dict[str, Any]:
    """Train on the other folds, score this one, and return its scores by key and the keys that a filter keeps."""
    model = out / f"scorer-{fold}-{share:g}-{folds}-{epochs:g}"
    others = [str(noisy / f"fold-{other}.tar") for other in range(folds) if other != fold]
    cpu = _fit(settings, model, others, ["--trainer.max_epochs", f"{epochs:g}"])
    index = ShardIndex.build(str(noisy / f"fold-{fold}.tar"))
    scores = out / f"scores-{model.name}"
    score_shards(index, scores, [str(model / "last")], partial(load, precision="fp32"), captions=captions)
    result = filter_table(scores, f"clip_score > q({share:g})")
    found = dict(zip(result.columns["key"].tolist(), result.columns["clip_score"].tolist(), strict=True))
    kept = [key for key, stays in zip(found, result.kept.tolist(), strict=True) if stays]
    return {"scores": found, "kept": kept, "cpu": cpu}


def _recall(folder: Path, evaluation: Path) -> float:
    """Return recall@10 of the last model of a run, the mean of both directions."""
    data, embedder = BenchmarkSet.open(evaluation), dualenc.load(str(folder / "last"))
    metrics = score(data, embed_set(embedder, data), embedder).section.result["metrics"]
    return sum(metrics[name] for name in RECALLS) / len(RECALLS)


def auroc(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Return the probability that a wrong pair has a lower score than a right one; a tie counts half.

    Args:
        scores: (N,) scores.
        wrong: (N,) bool.
    """
    right = np.sort(scores[~wrong])
    below, upto = (np.searchsorted(right, scores[wrong], side).astype(np.float64) for side in ("left", "right"))
    return float(1 - (below + upto).mean() / (2 * len(right)))


def precision_at(scores: np.ndarray, wrong: np.ndarray, recall: float) -> float:
    """Return the share of wrong pairs among those of the lowest scores that hold `recall` of all wrong pairs."""
    ordered = np.sort(scores[wrong])
    cut = ordered[int(np.ceil(recall * len(ordered))) - 1]
    return float(wrong[scores <= cut].mean())


def table(
    records: Sequence[dict[str, Any]], mismatched: dict[str, bool], scoring: dict[str, Any], training: dict[str, Any]
) -> str:
    """Return the page: the search for mismatched pairs in each fold, and the recall of each arm."""
    folds = [_find(records, {**scoring, "fold": fold})[0] for fold in range(scoring["folds"])]
    lines = [
        "# noise",
        "",
        "| fold | pairs | mismatched | AUROC | precision at 80% recall | CPU s |",
        "|---|" + "---|" * 5,
    ]
    values = []
    for record in folds:
        scores = np.array(list(record["scores"].values()), np.float64)
        wrong = np.array([mismatched[key] for key in record["scores"]])
        values.append((auroc(scores, wrong), precision_at(scores, wrong, 0.8)))
        found = f"{values[-1][0]:.3f} | {values[-1][1]:.3f}"
        lines.append(f"| {record['fold']} | {len(wrong):,} | {wrong.sum():,} | {found} | {record['cpu']:.0f} |")
    average = " | ".join(f"{mean(column):.3f}" for column in zip(*values))
    cpu = sum(record["cpu"] for record in folds)
    lines.append(f"| mean | {len(mismatched):,} | {sum(mismatched.values()):,} | {average} | {cpu:.0f} |")
    kept = [key for record in folds for key in record["kept"]]
    left = mean(mismatched[key] for key in kept)
    lines += ["", f"The filter keeps {len(kept):,} pairs, {left:.1%} of which are mismatched.", ""]
    lines += ["| trained on | recall@10, mean | standard deviation | of each seed | CPU s |", "|---|" + "---|" * 4]
    for arm in ARMS:
        own = sorted(_find(records, {**training, "arm": arm}), key=lambda record: record["seed"])
        recalls = [record["recall"] for record in own]
        each = ", ".join(f"{recall:.4f}" for recall in recalls)
        spread = f"{stdev(recalls):.4f}" if len(recalls) > 1 else "-"
        seconds = median(record["cpu"] for record in own)
        lines.append(f"| {arm} | {mean(recalls):.4f} | {spread} | {each} | {seconds:.0f} |")
    first = folds[0]
    return "\n".join([
        *lines,
        "",
        f"{training['settings']} on {training['evaluation']}: {training['share']:.0%} of the samples have the texts of "
        f"another. {training['folds']} models, of {training['scorer_epochs']:g} epochs on the other folds, score a "
        f"fold; the filter leaves out the lowest {training['share']:.0%} of each. Then {training['steps']:,} steps in "
        "every run. recall@10 is the mean of both directions, at the end.",
        "",
        f"{first['date']}, `python -m tools.bench {' '.join(sys.argv[1:])}`, {first['machine']['cores']} cores of "
        f"{first['machine']['cpu']}; {', '.join(f'{name} {version}' for name, version in first['versions'].items())}.",
        "",
    ])  # fmt: skip
