"""Embeddings of text files: one safetensors file for each, written atomically."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from dualenc.data.image_features import KEY
from dualenc.data.loading.bad_samples import BadRecord
from dualenc.data.text.dataset import Use, field, texts_of
from dualenc.data.text.files import TextFile, TextIndex
from dualenc.inference.embed_files import Embedded, Track, write_arrays
from dualenc.inference.embedding import embedding_dim, prompt_text
from dualenc.inference.text_model import TextPredictor
from dualenc.utils.decoding import text_problem
from dualenc.utils.errors import BadSample, DataError

CHUNK = 4096  # lines read at once
OPTIONS = ("prompt", "dim")  # recorded in a file where they change its vectors


def embed_text_files(
    predictor: TextPredictor,
    files: Sequence[str],
    out: str | os.PathLike[str],
    column: str = "text",
    *,
    tokens: bool = False,
    prompt: str | None = None,
    dim: int | None = None,
    batch_size: int = 256,
    track: Track = lambda items, total: items,
) -> Embedded:
    """Write OUT/NAME.safetensors for each text file.

    The file holds `embeddings` (N, E) of unit length, one for each line. With `tokens`, it holds `tokens` (M, D), the
    hidden states of the tokens of all lines with special tokens, their `ids` (M,), and `offsets` (N + 1,): the tokens
    of line i are `offsets[i]` to `offsets[i + 1]`. A line that cannot be read has a row of NaN, or zero tokens, and is
    listed in the result. An empty text has the vector of its special tokens, see `TextPredictor.embed`.

    Args:
        predictor: the model.
        files: `.txt`, `.tsv`, `.csv`, `.jsonl`: paths, globs, brace patterns.
        out: folder, created if missing.
        column: column of the text.
        tokens: write hidden states of tokens instead of embeddings of lines; without a prompt, of all dimensions.
        prompt, dim: see `TextPredictor.embed`.
        batch_size: texts per forward pass.
        track: wraps the chunks of lines, whose number is `total`, for a progress bar.

    Raises:
        DataError: If a file is missing, does not have the column, or shares its name with another; or if a file in the
            folder is of another model, other texts or other options.
        ModelError: If the model does not have the prompt or the dimensions.
    """
    out, began = Path(out), time.monotonic()
    index = TextIndex.build(list(files), [column])
    names = [Path(file.url).name for file in index.parts]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise DataError(f"two files have the name {twice[0]}: embed them into two folders")
    what: Literal["texts", "tokens"] = "tokens" if tokens else "texts"
    width, options = (predictor.model.config.width, {}) if tokens else _meaning(predictor, prompt, dim)
    common = {**_made_by(predictor), "column": column, "what": what, **options}
    out.mkdir(parents=True, exist_ok=True)
    paths, bad = [out / f"{name}.safetensors" for name in names], []
    todo: list[tuple[TextFile, Path, dict[str, Any]]] = []
    for file, path in zip(index.parts, paths):
        about = {"digest": file.digest, **common}
        if path.exists():
            bad += _bad_lines(path, about)
        else:
            todo.append((file, path, about))
    bad += _write_texts(predictor, todo, {"prompt": prompt, "dim": dim, "batch_size": batch_size}, track)
    return Embedded(
        out=out,
        what=what,
        dims=width,
        samples=0,
        texts=len(index),
        files=len(paths),
        before=len(paths) - len(todo),
        bad=bad,
        bytes=sum(path.stat().st_size for path in paths),
        done=sum(len(file) for file, _, _ in todo),
        seconds=time.monotonic() - began,
    )


def _made_by(predictor: TextPredictor) -> dict[str, Any]:
    """Return what the model adds to the options that a file was written with."""
    return {"made_by": predictor.fingerprint, "precision": predictor.precision}


def _meaning(predictor: TextPredictor, prompt: str | None, dim: int | None) -> tuple[int, dict[str, Any]]:
    """Return the dimensions of the vectors, and what the options change: two names or defaults may mean the same."""
    model = predictor.model
    width = embedding_dim(model.vectors, dim, model.embedding_width, predictor.name)
    before = prompt_text(model.vectors, prompt, predictor.name)
    return width, ({"prompt": before} if before else {}) | ({"dim": width} if width < model.embedding_width else {})


def _write_texts(
    predictor: TextPredictor, todo: list[tuple[TextFile, Path, dict[str, Any]]], options: dict[str, Any], track: Track
) -> list[BadRecord]:
    """Write the embeddings of each text file, and return the lines that cannot be read; see `_vectors`."""
    chunks = [(n, first) for n, (file, _, _) in enumerate(todo) for first in range(0, len(file), CHUNK)]
    parts: list[dict[str, np.ndarray]] = []
    bad, bad_of_file = [], []
    for n, first in track(chunks, total=len(chunks)):
        file, path, about = todo[n]
        tokens, use = about["what"] == "tokens", Use("", about["column"])
        rows, texts = read_lines(file, use, range(first, min(first + CHUNK, len(file))), bad_of_file)
        parts.append(_vectors(predictor, rows, texts, min(CHUNK, len(file) - first), tokens, options))
        if first + CHUNK >= len(file):
            arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
            if tokens:
                arrays["offsets"] = np.concatenate([[0], np.cumsum(arrays.pop("lengths"))])
            write_arrays(path, arrays, {**about, "bad": bad_of_file})
            bad, parts, bad_of_file = [*bad, *bad_of_file], [], []
    return bad


def _bad_lines(path: Path, about: Mapping[str, Any]) -> list[BadRecord]:
    """Return the bad lines in a file that an earlier call wrote.

    Raises:
        DataError: If the file is damaged, or of another model, text or option.
    """
    try:
        with safe_open(path, "numpy") as file:
            kept = {"precision": "fp32", **json.loads(file.metadata()[KEY])}  # The first release does not name it.
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{path} is damaged, or dualenc embed did not write it: remove it, or name a new folder"
        ) from None
    if {name: kept.get(name) for name in (*about, *OPTIONS)} != {**dict.fromkeys(OPTIONS), **about}:
        raise DataError(f"{path} is of another model, other texts or other options: name a new folder")
    return [BadRecord(*item) for item in kept["bad"]]


def read_lines(file: TextFile, use: Use, numbers: range, bad: list[BadRecord]) -> tuple[list[int], list[str]]:
    """Return the row numbers and texts of the readable lines, and add the others to `bad`."""
    index = TextIndex([file])
    rows, texts = [], []
    for row in numbers:
        try:
            fields = index[row].read()
            text = field(index[row], fields, use.text)
            # A text without words has the vector of its special tokens; where there is no text, the line is bad.
            empty = isinstance(text, str) and text_problem(text) == "empty"
            texts.append(text if empty else texts_of(index[row], use, fields)[0])
            rows.append(row - numbers.start)
        except BadSample as error:
            bad.append(BadRecord(row, file.url, file.key(row), error.cause, error.detail))
    return rows, texts


def _vectors(
    predictor: TextPredictor, rows: list[int], texts: list[str], count: int, tokens: bool, options: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Embed texts as the arrays of a file: one row for each line, or the tokens of all lines with their numbers.

    Args:
        predictor: the model.
        rows: row of each text.
        texts: the texts.
        count: number of rows.
        tokens: see `embed_text_files`.
        options: keyword arguments of `TextPredictor.embed`.
    """
    if not tokens:
        found = predictor.embed(texts or [""], **options).numpy()
        embeddings = np.full((count, found.shape[1]), np.nan, np.float32)
        embeddings[rows] = found[: len(texts)]
        return {"embeddings": embeddings}
    width = predictor.model.config.width
    lengths, ids, vectors = np.zeros(count, np.int64), [np.zeros(0, np.int64)], [np.zeros((0, width), np.float32)]
    for row, tokens_of_row, (_, hidden) in zip(rows, predictor.tokenizer.encode(texts), predictor.embed_tokens(texts)):
        lengths[row] = len(tokens_of_row)
        ids.append(np.array(tokens_of_row, np.int64))
        vectors.append(hidden.numpy())
    return {"lengths": lengths, "ids": np.concatenate(ids), "tokens": np.concatenate(vectors)}
