"""Vectors of the texts of a file, or of each of their tokens, written beside what they are of."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dualenc.data.loading.bad_samples import Bad, causes
from dualenc.data.text.dataset import Use, texts_of
from dualenc.data.text.files import TextFile, TextIndex
from dualenc.inference.embedder import fingerprint
from dualenc.inference.text_model import TextPredictor
from dualenc.utils.errors import BadSample, DataError

KEY = "dualenc"  # of the metadata
CHUNK = 4096  # lines that are read at a time


class Vectors(NamedTuple):
    """What `embed_lines` wrote."""

    files: list[Path]
    lines: int
    dims: int
    before: int  # files that an earlier call had written
    bad: list[Bad]


def embed_lines(
    predictor: TextPredictor,
    files: Sequence[str],
    out: str | os.PathLike[str],
    column: str = "text",
    *,
    tokens: bool = False,
    batch_size: int = 256,
    track: Callable[..., Iterable[Any]] = lambda items, total: items,
) -> Vectors:
    """Writes OUT/NAME.safetensors for each file of texts; the same call again leaves those that are there.

    `embeddings` (N, D) are unit vectors of the lines; or, of `tokens`, `tokens` (M, D) are the hidden states of the
    tokens of all lines, special ones included, `ids` (M,) their ids, and line i is `offsets[i]` to `offsets[i + 1]` of
    (N + 1,). A line that cannot be read has a row of NaN, or no token, and is named in the result.

    Args:
        predictor: the model.
        files: `.txt`, `.tsv`, `.csv`, `.jsonl`: paths, globs, brace patterns.
        out: folder, made if missing.
        column: of the text.
        tokens: writes vectors of the tokens.
        batch_size: texts a forward pass.
        track: wraps the chunks of lines, of which `total` says how many there are, for a progress bar.

    Raises:
        DataError: a file is missing, has no such column, or shares its name with another; or a file of OUT is of
            another model or other texts.
    """
    index, use, out = TextIndex.build(list(files), [column]), Use("", "embedding", column), Path(out)
    stems = [Path(file.url).name for file in index.parts]
    if twice := [stem for i, stem in enumerate(stems) if stem in stems[:i]]:
        raise DataError(f"two files are called {twice[0]}: embed them into two folders")
    out.mkdir(parents=True, exist_ok=True)
    made_by = fingerprint(predictor.model, None, predictor.tokenizer.fingerprint)
    paths, bad, before = [], [], 0
    todo: list[tuple[TextFile, Path, dict[str, Any]]] = []
    for file, stem in zip(index.parts, stems):
        path = out / f"{stem}.safetensors"
        about = {"digest": file.digest, "made_by": made_by, "column": column, "what": "tokens" if tokens else "texts"}
        paths.append(path)
        if path.exists():
            kept = _about(path)
            if {name: kept.get(name) for name in about} != about:
                raise DataError(f"{path} is of another model, other texts or another choice: name a new folder")
            bad += [Bad(*item) for item in kept["bad"]]
            before += 1
        else:
            todo.append((file, path, about))
    chunks = [(n, first) for n, (file, _, _) in enumerate(todo) for first in range(0, len(file), CHUNK)]
    parts: list[dict[str, np.ndarray]] = []
    here: list[Bad] = []
    for n, first in track(chunks, total=len(chunks)):
        file, path, about = todo[n]
        own = TextIndex([file])
        rows, texts = [], []
        for row in range(first, min(first + CHUNK, len(file))):
            try:
                texts.append(texts_of(own[row], use)[0])
                rows.append(row - first)
            except BadSample as error:
                here.append(Bad(row, file.url, file.key(row), error.cause, error.detail))
        count = min(CHUNK, len(file) - first)
        parts.append(_vectors(predictor, rows, texts, count, tokens, batch_size))
        if first + CHUNK >= len(file):
            _write(path, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, about, here)
            bad += here
            parts, here = [], []
    return Vectors(paths, len(index), predictor.model.config.width, before, bad)


def _vectors(
    predictor: TextPredictor, rows: list[int], texts: list[str], count: int, tokens: bool, batch_size: int
) -> dict[str, np.ndarray]:
    width = predictor.model.config.width
    if not tokens:
        found = np.full((count, width), np.nan, np.float32)
        if texts:
            found[rows] = predictor.embed(texts, batch_size).numpy()
        return {"embeddings": found}
    lengths, ids, vectors = np.zeros(count, np.int64), [np.zeros(0, np.int64)], [np.zeros((0, width), np.float32)]
    for row, own, (_, hidden) in zip(rows, predictor.tokenizer.encode(texts), predictor.embed_tokens(texts)):
        lengths[row] = len(own)
        ids.append(np.array(own, np.int64))
        vectors.append(hidden.numpy())
    return {"lengths": lengths, "ids": np.concatenate(ids), "tokens": np.concatenate(vectors)}


def _write(path: Path, arrays: dict[str, np.ndarray], about: dict[str, Any], bad: list[Bad]) -> None:
    if "lengths" in arrays:
        arrays["offsets"] = np.concatenate([[0], np.cumsum(arrays.pop("lengths"))])
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(arrays, beside, {KEY: json.dumps({**about, "bad": bad})})
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _about(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "numpy") as file:
            return json.loads(file.metadata()[KEY])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path} is damaged or not of dualenc embed: remove it, or name a new folder") from None


def in_words(made: Vectors, out: Path, tokens: bool) -> list[str]:
    """For the screen."""
    what = "vectors of the tokens" if tokens else "vectors"
    plural = "s" * (len(made.files) != 1)
    lines = [f"{out}: {what} of {made.lines:,} texts in {len(made.files):,} file{plural}, {made.dims} dimensions"]
    if made.before:
        there = "all of them" if made.before == len(made.files) else f"{made.before:,} of the files"
        lines.append(f"{there} were there before")
    if made.bad:
        lines.append(f"{len(made.bad):,} texts could not be read: {causes(made.bad)}")
    return lines
