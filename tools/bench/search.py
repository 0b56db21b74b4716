"""Benchmark of search among given embeddings, against faiss, usearch and the choice of clip-retrieval."""

import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tools.bench.runner import Side, compare

K = 10  # rows to find
SEGMENT = 10_000  # rows of a segment, as many as shards usually have samples


def search(
    rows: int = 100_000,
    dims: int = 512,
    queries: int = 64,
    embeddings: Path | None = None,
    sides: Sequence[str] = ("exact", "auto", "faiss Flat", "faiss RaBitQ,Refine(SQfp16)", "faiss HNSW32", "usearch"),
    rounds: int = 5,
    cores: int = 1,
    out: Path = Path("runs/bench"),
) -> None:
    """Measure queries per second, recall of the exact 10 nearest, memory and time to build; queries come one by one.

    The sides "exact" and "auto" are an index of dualenc with the same rows in segments of 10,000. "faiss SPEC" is faiss
    with fp32 rows; HNSW32 is the choice of clip-retrieval: its autofaiss takes HNSW with up to 32 links wherever that
    fits into 4 GB, and then the greatest efSearch that keeps a query below 10 ms; here efSearch is 256. "usearch" has
    fp16 rows and its defaults.

    Args:
        rows: number of rows.
        dims: width of the embeddings.
        queries: number of queries, which are held-out embeddings.
        embeddings: folder of `dualenc embed`, or of an index of `dualenc build-search`, whose embeddings are multiplied
            by interpolation and noise, and turned into `dims` dimensions by a rotation; None for synthetic clusters.
        sides: what to measure.
        rounds: timed rounds of each side.
        cores: CPU cores of each side.
        out: folder for search.json and search.md.
    """
    with TemporaryDirectory(dir=out.parent if out.parent.is_dir() else None) as folder:
        matrix, asked, origin = _draw(rows, dims, queries, embeddings)
        np.save(f"{folder}/rows.npy", matrix)
        np.save(f"{folder}/queries.npy", asked)
        del matrix
        made = [Side(name, partial(_side, name, folder)) for name in sides]
        result = compare("search", "queries", made, sides[0], rounds, cores=cores)
        exact = _exact(folder)
        facts: dict[str, Any] = {}
        for name in sides:
            found = np.load(f"{folder}/{_plain(name)}.npy")
            recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), exact.tolist())])
            facts[name] = {"recall@10": round(float(recall), 4)} | json.loads(
                Path(f"{folder}/{_plain(name)}.json").read_text("utf-8")
            )
    result.settings = {"rows": rows, "dims": dims, "queries": queries, "embeddings": origin}
    result.facts["sides"] = facts
    result.notes = [f"{rows:,} rows, E = {dims}, {queries} held-out queries one by one, {origin}."]
    result.notes += [
        f"{name}: recall@10 {one['recall@10']:.4f}, built in {one['seconds']:,.0f} s, "
        f"{one['mib']:,.0f} MiB in addition to those before it was built, {one['disk_mib']:,.0f} MiB of files"
        for name, one in facts.items()
    ]
    result.write(out)


def _draw(rows: int, dims: int, queries: int, source: Path | None) -> tuple[np.ndarray, np.ndarray, str]:
    """Return rows (N, E) fp16 and queries (Q, E) fp32 of unit length, and a text about their origin."""
    rng = np.random.default_rng(0)
    if source is None:
        centers = rng.standard_normal((max(1, rows // 50), dims)).astype(np.float32)
        known, origin = centers, f"synthetic: {len(centers):,} clusters"
        noise = 0.7
    else:
        known = _read(source)
        origin, noise = f"{len(known):,} embeddings of {source.name}, multiplied by interpolation and noise", 0.3
        if known.shape[1] < dims:  # An isometry keeps all cosines.
            turn = np.linalg.qr(rng.standard_normal((dims, known.shape[1])))[0].astype(np.float32)
            known = known @ turn.T
        known = known[rng.permutation(len(known))]
    asked = known[:queries] if source is not None else _noisy(rng, known[:queries], noise)
    known = known[queries:] if source is not None else known
    matrix = np.empty((rows, known.shape[1]), np.float16)
    for first in range(0, rows, SEGMENT):
        count = min(SEGMENT, rows - first)
        base, other = known[rng.integers(len(known), size=count)], known[rng.integers(len(known), size=count)]
        share = rng.uniform(0, 0.3, (count, 1)).astype(np.float32) if source is not None else np.float32(0)
        matrix[first : first + count] = _noisy(rng, (1 - share) * base + share * other, noise)
    return matrix, asked / np.linalg.norm(asked, axis=1, keepdims=True), origin


def _noisy(rng: np.random.Generator, vectors: np.ndarray, size: float) -> np.ndarray:
    """Add a random vector of a length relative to each vector's, and return unit vectors."""
    noise = rng.standard_normal(vectors.shape).astype(np.float32) * (size / np.sqrt(vectors.shape[1]))
    made = vectors + noise * np.linalg.norm(vectors, axis=1, keepdims=True)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def _read(folder: Path) -> np.ndarray:
    """Read the embeddings of a folder of `dualenc embed`, or of the segments of an index."""
    from safetensors.numpy import load_file

    parts = []
    for path in sorted(folder.rglob("*.safetensors")):
        arrays = load_file(path)
        parts.append(arrays["embeddings" if "embeddings" in arrays else "image"].astype(np.float32))
    found = np.concatenate(parts)
    return found[np.isfinite(found).all(1)]


def _plain(name: str) -> str:
    return "".join(one if one.isalnum() else "_" for one in name)


def _side(name: str, folder: str) -> Callable[[], float]:
    """Build a side, and return a function that runs all queries one by one, for `Side.make`."""
    import torch

    from tools.bench.runner import process_memory

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    matrix, asked = np.load(f"{folder}/rows.npy", mmap_mode="r"), np.load(f"{folder}/queries.npy")
    before, began = process_memory(os.getpid(), "VmRSS"), time.perf_counter()
    make = _ours if name in ("exact", "auto") else _usearch if name == "usearch" else _faiss
    find, disk = make(name, matrix, f"{folder}/{_plain(name)}")
    seconds = time.perf_counter() - began
    found = np.array([find(query[None]) for query in asked])
    np.save(f"{folder}/{_plain(name)}.npy", found)
    used = process_memory(os.getpid(), "VmRSS") - before
    about = {"seconds": seconds, "mib": used / 2**20, "disk_mib": disk / 2**20}
    Path(f"{folder}/{_plain(name)}.json").write_text(json.dumps(about), "utf-8")

    def run() -> float:
        for query in asked:
            find(query[None])
        return float(len(asked))

    return run


def _ours(name: str, matrix: np.ndarray, path: str) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """Write an index with these rows, and open it."""
    from dualenc import Index
    from dualenc.search.ann import build_ann, choose_spec
    from dualenc.search.folder import SEGMENTS
    from dualenc.search.segments import Contents, Rows, Segment, write_segment

    out = Path(path)
    (out / SEGMENTS).mkdir(parents=True)
    files = []
    for first in range(0, len(matrix), SEGMENT):
        part = matrix[first : first + SEGMENT]
        records = [{"key": f"{first + i:09d}", "captions": [], "fields": {}} for i in range(len(part))]
        files.append(f"{first // SEGMENT:05d}.safetensors")
        write_segment(out / SEGMENTS / files[-1], "", Contents(part, records, np.zeros(len(part), np.uint64), []))
    rows = Rows([Segment(out / SEGMENTS / file).embeddings for file in files], matrix.shape[1])
    spec = choose_spec(name, len(rows))
    about = {"format": 1, "kind": "images", "model": "", "fingerprint": "", "dims": matrix.shape[1], "options": {}}
    about |= {"ann": spec and build_ann(spec, rows, out / "ann.faiss"), "fields": [], "precision": "fp32"}
    about["segments"] = [{"file": file, "source": file} for file in files]
    (out / "search.json").write_text(json.dumps(about), "utf-8")
    index = Index.open(out)
    disk = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return lambda query: index.search_many(query, K)[1][0], disk


def _faiss(name: str, matrix: np.ndarray, path: str) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    import faiss

    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    made = faiss.index_factory(matrix.shape[1], name.removeprefix("faiss "), faiss.METRIC_INNER_PRODUCT)
    made.train(matrix[:: max(1, len(matrix) // 65_536)].astype(np.float32))
    for first in range(0, len(matrix), SEGMENT):
        made.add(matrix[first : first + SEGMENT].astype(np.float32))
    if hasattr(made, "hnsw"):
        made.hnsw.efSearch = 256
    if hasattr(made, "k_factor"):
        made.k_factor = 10
    faiss.write_index(made, path)
    return lambda query: made.search(query, K)[1][0], Path(path).stat().st_size


def _usearch(name: str, matrix: np.ndarray, path: str) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    from usearch.index import Index as Peer

    made = Peer(ndim=matrix.shape[1], metric="ip", dtype="f16")
    for first in range(0, len(matrix), SEGMENT):
        part = np.ascontiguousarray(matrix[first : first + SEGMENT])
        made.add(np.arange(first, first + len(part)), part, threads=len(os.sched_getaffinity(0)))
    made.save(path)
    return lambda query: np.asarray(made.search(query[0], K).keys, np.int64), Path(path).stat().st_size


def _exact(folder: str) -> np.ndarray:
    """Return the exact nearest rows (Q, K) in float64."""
    from dualenc.search.exact import nearest_rows
    from dualenc.search.segments import Rows

    matrix = np.load(f"{folder}/rows.npy", mmap_mode="r")
    found = nearest_rows(Rows([matrix], matrix.shape[1]), np.load(f"{folder}/queries.npy"), K)
    return np.array([rows for rows, _ in found])
