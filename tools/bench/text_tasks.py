"""Benchmarks of tagging and answering next to transformers, on one folder of weights that both read."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dualenc
from dualenc.data.text.files import TextIndex
from dualenc.utils.files import read_json, write_json
from tools.bench.runner import Result, Side, compare

OURS = "dualenc"
BATCHES = (1, 8, 32)
LONGEST, STRIDE, BEST, SPAN = 384, 128, 20, 30  # windows and candidates of the recipe for question answering
Answers = list[Any]  # what a side answers for each text, comparable between sides


def tagging(model: str, files: str, rounds: int = 5, cores: int = 2, out: Path = Path("runs/bench")) -> None:
    """Measure the sentences per second of `TextPredictor.tag`, and of transformers' pipeline at several batch sizes.

    Args:
        model: folder of a text model with one head for named entities, which transformers reads, too.
        files: sentences, as for the head.
        rounds: timed rounds of each side.
        cores: CPU cores of each side.
        out: folder for tagging.json and tagging.md.
    """
    texts = [" ".join(line.read()["tokens"]) for line in TextIndex.build(files)]
    _measure("tagging", "sentences", _tag, _tag_pipeline, "pipeline", model, texts, rounds, cores, out)


def answering(model: str, files: str, rounds: int = 5, cores: int = 2, out: Path = Path("runs/bench")) -> None:
    """Measure the questions per second of `TextPredictor.answer`, and of transformers' model under its own recipe.

    transformers 5 does not have a pipeline for questions. Its side tokenizes, predicts in batches of windows padded to
    the longest, and chooses among the 20 best starts and ends of each window, as its example does.

    Args:
        model: folder of a text model with one head for questions, which transformers reads, too.
        files: questions, as for the head.
        rounds: timed rounds of each side.
        cores: CPU cores of each side.
        out: folder for answering.json and answering.md.
    """
    fields = [line.read() for line in TextIndex.build(files)]
    pairs = [(one["question"], one["context"]) for one in fields]
    _measure("answering", "questions", _answer, _answer_recipe, "recipe", model, pairs, rounds, cores, out)


def _measure(
    name: str,
    unit: str,
    ours: Callable[[str, Sequence[Any]], Answers],
    theirs: Callable[[str, int], Callable[[Sequence[Any]], Answers]],
    peer: str,
    model: str,
    inputs: Sequence[Any],
    rounds: int,
    cores: int,
    out: Path,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "inputs.json", inputs)
        makes = {
            OURS: partial(_ours, ours, model),
            **{f"{peer}, batch {n}": partial(theirs, model, n) for n in BATCHES},
        }
        sides = [Side(side, partial(_side, side, make, folder)) for side, make in makes.items()]
        result = compare(name, unit, sides, OURS, rounds, cores=cores)
        answers = {side: read_json(Path(folder) / f"{side}.json") for side in makes}
    differ = {
        side: sum(a != b for a, b in zip(answers[OURS], found)) for side, found in answers.items() if side != OURS
    }
    result.settings = {"model": Path(model).name, unit: len(inputs)}
    result.facts["different answers"] = differ
    result.notes = [
        f"fp32, {len(inputs):,} {unit}. dualenc is {1 / _best(result):.2f} times as fast as the best batch size of "
        "transformers.",
        f"{unit.capitalize()} with other answers than those of dualenc: "
        + ", ".join(f"{number} ({side})" for side, number in differ.items()),
    ]
    result.write(out)


def _best(result: Result) -> float:
    """Return the largest median ratio of a side of transformers to dualenc."""
    return max(float(np.median(result.ratios(side))) for side in result.seconds if side != OURS)


def _side(side: str, make: Callable[[], Callable[[Sequence[Any]], Answers]], folder: str) -> Callable[[], float]:
    """Build the round of a side; the first round saves the answers in the folder."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    inputs, answer = read_json(Path(folder) / "inputs.json"), make()

    def run() -> float:
        found = answer(inputs)
        if not (path := Path(folder) / f"{side}.json").exists():
            write_json(path, found)
        return float(len(inputs))

    return run


def _ours(answer: Callable[[Any, Sequence[Any]], Answers], model: str) -> Callable[[Sequence[Any]], Answers]:
    return partial(answer, dualenc.load_text(model, "cpu"))


def _tag(predictor: Any, texts: Sequence[str]) -> Answers:
    return [[[one["label"], one["start"], one["end"]] for one in found] for found in predictor.tag(texts)]


def _tag_pipeline(model: str, batch: int) -> Callable[[Sequence[str]], Answers]:
    from transformers import pipeline

    tagger: Any = pipeline("token-classification", model, aggregation_strategy="first", device="cpu")

    def run(texts: Sequence[str]) -> Answers:
        found = tagger(list(texts), batch_size=batch)
        return [[[one["entity_group"], one["start"], one["end"]] for one in entities] for entities in found]

    return run


def _answer(predictor: Any, pairs: Sequence[tuple[str, str]]) -> Answers:
    questions, contexts = zip(*pairs)
    return [found[0]["text"] for found in predictor.answer(list(questions), list(contexts))]


def _answer_recipe(model: str, batch: int) -> Callable[[Sequence[tuple[str, str]]], Answers]:
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    tokenizer, net = AutoTokenizer.from_pretrained(model), AutoModelForQuestionAnswering.from_pretrained(model).eval()

    def run(pairs: Sequence[tuple[str, str]]) -> Answers:
        questions, contexts = zip(*pairs)
        windows: Any = tokenizer(
            list(questions), list(contexts), truncation="only_second", max_length=LONGEST, stride=STRIDE,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )  # fmt: skip
        best: list[tuple[float, str]] = [(-np.inf, "")] * len(pairs)
        names = [name for name in ("input_ids", "token_type_ids", "attention_mask") if name in windows]
        for first in range(0, len(windows["input_ids"]), batch):
            numbers = range(first, min(first + batch, len(windows["input_ids"])))
            padded = tokenizer.pad({name: [windows[name][i] for i in numbers] for name in names}, return_tensors="pt")
            with torch.inference_mode():
                logits = net(**padded)
            for row, i in enumerate(numbers):
                question = windows["overflow_to_sample_mapping"][i]
                scores = logits.start_logits[row].numpy(), logits.end_logits[row].numpy()
                for score, start, end in _spans(*scores, windows.sequence_ids(i), windows["offset_mapping"][i]):
                    if score > best[question][0]:
                        best[question] = score, contexts[question][start:end]
        return [text for _, text in best]

    return run


def _spans(
    start: np.ndarray, end: np.ndarray, parts: list[int | None], offsets: list[tuple[int, int]]
) -> Iterator[tuple[float, int, int]]:
    """Yield score and characters of the spans between the best starts and ends of a window, inside its context."""
    for i in np.argsort(-start, kind="stable")[:BEST].tolist():
        for j in np.argsort(-end, kind="stable")[:BEST].tolist():
            if i <= j < i + SPAN and j < len(parts) and parts[i] == parts[j] == 1:
                yield float(start[i] + end[j]), offsets[i][0], offsets[j][1]
