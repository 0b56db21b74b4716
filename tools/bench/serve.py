"""Load test of `dualenc serve`: many clients at once, each answer compared with what is known.

The server runs in a process of its own, and so do the clients. A small dual encoder with random weights and an index of
texts are made first, and with them the answers to a set of questions, one at a time, without the server.
"""

import base64
import http.client
import io
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

WORDS = [
    "red",
    "blue",
    "small",
    "old",
    "cat",
    "dog",
    "boat",
    "tree",
    "hat",
    "mat",
    "sits",
    "runs",
    "on",
    "near",
    "two",
    "the",
]
TOLERANCE = 1e-4  # of scores and embeddings; a batch rounds elsewhere than a single text


@dataclass(frozen=True)
class Question:
    """A request with the numbers that its answer must have."""

    path: str
    body: bytes
    numbers: list[float]


def serve(
    clients: int = 64,
    seconds: float = 60,
    alone: float = 20,
    rows: int = 5000,
    questions: int = 400,
    out: Path = Path("runs/bench"),
) -> None:
    """Measure requests per second, latency, memory, errors and wrong answers of the server under load.

    Args:
        clients: clients at once, each with one connection.
        seconds: length of the load.
        alone: seconds of the comparison: one client, and a server that neither batches nor waits.
        rows: texts of the index.
        questions: number of different requests: 3 of 4 are searches by words, the others embeddings and searches by a
            picture.
        out: folder for serve.json.
    """
    with tempfile.TemporaryDirectory() as folder:
        asked = _prepare(Path(folder), rows, questions)
        single = _measure(Path(folder) / "index", asked, 1, alone, "--max-batch", "1", "--wait-ms", "0")
        many = _measure(Path(folder) / "index", asked, clients, seconds)
    ratio = many["rate"] / single["rate"]
    growth = many["memory"][-1] / many["memory"][0] - 1
    for name, found in (("one at a time", single), (f"{clients} clients", many)):
        print(
            f"{name}: {found['requests']:,} requests, {found['rate']:.0f} a second; median {found['median_ms']:.1f} "
            f"ms, p99 {found['p99_ms']:.1f} ms; {found['cpu_ms']:.1f} CPU ms of the server each; {found['errors']} "
            f"errors, {found['wrong']} wrong answers"
        )
    cpu = single["cpu_ms"] / many["cpu_ms"]
    first, last = many["memory"][0], many["memory"][-1]
    print(f"ratio {ratio:.2f}, by CPU time {cpu:.2f}; own memory {first:.0f} MiB after 10 s, {last:.0f} at the end")
    out.mkdir(parents=True, exist_ok=True)
    about = {"date": str(date.today()), "clients": clients, "seconds": seconds, "rows": rows, "questions": questions}
    facts = {**about, "single": single, "many": many, "ratio": ratio, "cpu_ratio": cpu, "memory_growth": growth}
    (out / "serve.json").write_text(json.dumps(facts, indent=2))
    failed = many["errors"] + many["wrong"] + single["errors"] + single["wrong"]
    if failed or ratio < 2 or abs(growth) > 0.1:
        sys.exit(f"not met: {failed} errors or wrong answers, ratio {ratio:.2f} (2), growth {growth:.1%} (10%)")


def _prepare(folder: Path, rows: int, questions: int) -> list[Question]:
    """Write a model and an index of texts, and return questions with their answers."""
    import torch
    from PIL import Image

    import dualenc
    from dualenc.search.build import build_search

    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = dualenc.Tokenizer.train([" ".join(WORDS)], 300, 32)
    image = dualenc.ImageConfig("vit_tiny_patch16_224", 64, {"patch_size": 16, "depth": 4})
    text = dualenc.TextConfig(tokenizer.vocab_size, width=256, layers=4, heads=4, context_length=32)
    model = dualenc.DualEncoder(image, text, embed_dim=256)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    embedder = dualenc.Embedder(model.eval(), tokenizer, dualenc.Preprocess(64))
    embedder.save(folder / "model")
    (folder / "texts.txt").write_text("\n".join(_sentence(rng) for _ in range(rows)))
    built = build_search(str(folder / "model"), [str(folder / "texts.txt")], folder / "index")
    print("\n".join(built.lines()[:1]))
    index = dualenc.Index.open(folder / "index", embedder)
    asked = []
    for i in range(questions):
        words = _sentence(rng)
        body: dict[str, Any] = {"texts": [words], "k": 10}
        path = "/api/search"
        if i % 8 == 7:
            pixels = np.random.default_rng(i).integers(0, 256, (6, 6, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).resize((80, 60)).save(file, "PNG")
            body = {"images": [f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"], "k": 10}
            numbers = index.search(images=[file.getvalue()], k=10).scores.tolist()
        elif i % 8 == 3:
            path, body = "/v1/embeddings", {"input": words}
            numbers = embedder.embed_texts(words)[0].tolist()
        else:
            numbers = index.search(texts=[words], k=10).scores.tolist()
        asked.append(Question(path, json.dumps(body).encode(), numbers))
    distinct = {tuple(np.round(one.numbers[:10], 3)) for one in asked}
    print(f"{len(distinct)} of {questions} answers differ from all others in the third decimal place")
    return asked


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 14)))


def _measure(index: Path, asked: list[Question], clients: int, seconds: float, *options: str) -> dict[str, Any]:
    """Start a server, ask it from a process of clients, and return what was measured."""
    command = [sys.executable, "-m", "dualenc", "serve", str(index), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = 0
        while not port:
            line = server.stdout.readline()
            assert line, "the server did not start"
            port = int(found[1]) if (found := re.search(r"http://127\.0\.0\.1:(\d+)", line)) else 0
        memory: list[float] = []
        started, cpu = time.monotonic(), _cpu(server.pid)
        context = multiprocessing.get_context("spawn")
        results = context.Queue()
        process = context.Process(target=_clients, args=(port, asked, clients, seconds, results))
        process.start()
        while process.is_alive() and results.empty():
            time.sleep(0.5)
            if time.monotonic() - started >= min(10, seconds / 2) and time.monotonic() - started < seconds:
                memory.append(_memory(server.pid))
        latencies, errors, wrong, length = results.get()
        cpu = _cpu(server.pid) - cpu
        process.join()
        server.terminate()
        server.communicate()
    assert server.returncode == 0, f"exit status {server.returncode}"
    return {
        "requests": len(latencies),
        "rate": len(latencies) / length,
        "median_ms": 1000 * statistics.median(latencies),
        "p99_ms": 1000 * float(np.quantile(latencies, 0.99)),
        "largest_ms": 1000 * max(latencies),
        "cpu_ms": 1000 * cpu / len(latencies),
        "errors": errors,
        "wrong": wrong,
        "memory": memory,
    }


def _cpu(pid: int) -> float:
    """Return the CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> float:
    """Return the memory of a process in MiB, without what is mapped from files."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) / 1024


def _clients(port: int, asked: list[Question], clients: int, seconds: float, results: Any) -> None:
    """Ask from threads until the time is over, and send the latencies and counts of errors and wrong answers."""
    latencies: list[float] = []
    errors, wrong = [0], [0]
    end = time.monotonic() + seconds

    def ask(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        rng = random.Random(number)
        while time.monotonic() < end:
            question = rng.choice(asked)
            started = time.monotonic()
            try:
                connection.request("POST", question.path, question.body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                content = answer.read()
            except OSError:
                errors[0] += 1
                connection.close()
                continue
            latencies.append(time.monotonic() - started)
            if answer.status != 200:
                errors[0] += 1
            elif not _same(question, json.loads(content)):
                wrong[0] += 1

    started = time.monotonic()
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put((latencies, errors[0], wrong[0], time.monotonic() - started))


def _same(question: Question, answer: dict[str, Any]) -> bool:
    """Return whether an answer has the numbers that are known."""
    read: Callable[[], list[float]] = {
        "/api/search": lambda: [hit["score"] for hit in answer["hits"]],
        "/v1/embeddings": lambda: answer["data"][0]["embedding"],
    }[question.path]
    found = read()
    return len(found) == len(question.numbers) and max(abs(a - b) for a, b in zip(found, question.numbers)) < TOLERANCE
