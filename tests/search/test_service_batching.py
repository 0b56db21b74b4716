"""Batching: many callers, one thread with the model, and nobody gets another's answer."""

import random
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from helpers import tiny_embedder
from serving import PATIENCE, HashEngine, ask, known_vectors, post, served, until

from dualenc.search.service.batching import Batcher, Job
from dualenc.search.service.cache import BytesCache
from dualenc.search.service.core import Limits, Service
from dualenc.search.service.refusals import Refusal
from dualenc.search.service.torch_engine import TorchEngine


class Gated:
    """A function for a `Batcher` that waits for a gate, and records its batches."""

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Event()
        self.batches: list[list[list[Any]]] = []

    def __call__(self, jobs: Any) -> list[Any]:
        self.batches.append([job.items["texts"] for job in jobs])
        self.entered.set()
        assert self.gate.wait(PATIENCE)
        if len(jobs) > 1 and any("explode" in job.items["texts"] for job in jobs):
            raise RuntimeError("all fail")
        return [ValueError("alone") if "explode" in job.items["texts"] else len(job) for job in jobs]


def batcher(gated: Gated, max_batch: int = 8, limit: int = 100) -> Batcher:
    """Return a batcher whose thread is busy with a first job, so that what comes now waits."""
    made = Batcher(gated, max_batch, 0, limit)
    made.submit(Job({"texts": ["first"]}))
    assert gated.entered.wait(PATIENCE)
    return made


def submit(made: Batcher, *sizes: int) -> list[Future[Any]]:
    return [made.submit(Job({"texts": [f"{size}"] * size})) for size in sizes]


def test_jobs_that_wait_are_computed_together_in_order() -> None:
    gated = Gated()
    made = batcher(gated)
    answers = submit(made, 3, 4, 1, 1, 20, 2, 6, 1)
    gated.gate.set()
    made.close()
    assert [answer.result(PATIENCE) for answer in answers] == [3, 4, 1, 1, 20, 2, 6, 1]
    # Batches of at most 8 texts; a job of more is a batch of its own.
    assert [list(map(len, batch)) for batch in gated.batches] == [[1], [3, 4, 1], [1], [20], [2, 6], [1]]


def test_a_job_that_was_canceled_is_not_computed() -> None:
    gated = Gated()
    made = batcher(gated)
    answers = submit(made, 1, 2, 3)
    assert answers[1].cancel()
    gated.gate.set()
    made.close()
    assert [answers[i].result(PATIENCE) for i in (0, 2)] == [1, 3]
    assert [list(map(len, batch)) for batch in gated.batches] == [[1], [1, 3]]


def test_a_job_that_fails_fails_alone() -> None:
    gated = Gated()
    made = batcher(gated)
    answers = [*submit(made, 1), made.submit(Job({"texts": ["explode"]})), *submit(made, 2)]
    gated.gate.set()
    made.close()
    assert [answers[i].result(PATIENCE) for i in (0, 2)] == [1, 2]
    assert isinstance(answers[1].exception(PATIENCE), ValueError)


def test_a_full_queue_refuses_and_a_closed_one_too() -> None:
    gated = Gated()
    made = batcher(gated, limit=2)
    answers = submit(made, 1, 2)
    with pytest.raises(Refusal) as caught:
        submit(made, 3)
    assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "1"})
    gated.gate.set()
    made.close()
    assert [answer.result(PATIENCE) for answer in answers] == [1, 2]
    with pytest.raises(Refusal, match="stops"):
        submit(made, 1)


def test_a_batch_waits_for_others_until_it_is_full() -> None:
    """With a wait of an hour, only a full batch can begin."""
    gated = Gated()
    gated.gate.set()
    made = Batcher(gated, 3, 3600, 100)
    answers = submit(made, 1, 1, 1)
    assert [answer.result(PATIENCE) for answer in answers] == [1, 1, 1]
    made.close()
    assert [len(batch) for batch in gated.batches] == [3]


def test_the_cache_keeps_what_was_used_last() -> None:
    cache = BytesCache(10)
    for key, size in (("a", 4), ("b", 4)):
        cache.put(key, bytes(size))
    assert cache.get("a") == bytes(4)
    cache.put("c", bytes(4))  # "b" was not used for longest
    assert [cache.get(key) for key in "abc"] == [bytes(4), None, bytes(4)]
    cache.put("a", bytes(2))
    assert cache.size == 6
    cache.put("huge", bytes(11))
    assert (cache.size, cache.get("huge")) == (0, None)


@pytest.mark.parametrize("kind", ["hashes", "torch"])
def test_16_clients_get_their_own_answers(kind: str, seed: int) -> None:
    """Each client asks 10 questions at the same time as the others; each answer is compared with what is known."""
    engine = HashEngine() if kind == "hashes" else TorchEngine(tiny_embedder(seed), "tiny")
    words = ["cat", "dog", "red", "hats", "two", "boats", "mat", "tree"]
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(300)]
    questions = [rng.choices(texts, k=rng.randint(1, 3)) for _ in range(160)]
    expected = {text: engine.embed_texts([text])[0] for text in texts}
    service = Service(engine, limits=Limits(max_batch=16, wait_ms=2))
    with served(service) as port:

        def client(number: int) -> list[Any]:
            mine = questions[number::16]
            return [post(port, "/v1/embeddings", input=texts)["data"] for texts in mine]

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(client, range(16)))
    for number, data in enumerate(answers):
        for texts, found in zip(questions[number::16], data, strict=True):
            vectors = np.array([one["embedding"] for one in found])
            assert np.allclose(vectors, [expected[text] for text in texts], atol=1e-6)
    assert 0 < service.batcher.batches <= 160


def test_requests_that_wait_share_a_pass() -> None:
    """While the model is busy with a first request, others come; they are embedded in one call."""
    engine = HashEngine()
    engine.gate.clear()
    service = Service(engine, limits=Limits(wait_ms=0))
    with served(service) as port, ThreadPoolExecutor(9) as pool:
        first = pool.submit(post, port, "/v1/embeddings", input="first")
        assert engine.entered.wait(PATIENCE)
        others = [pool.submit(post, port, "/v1/embeddings", input=f"text {i}") for i in range(8)]
        until(lambda: len(service.batcher._waiting) == 8)
        engine.gate.set()
        found = [one.result(PATIENCE)["data"][0]["embedding"] for one in others]
        first.result(PATIENCE)
    assert np.allclose(found, known_vectors([f"text {i}" for i in range(8)]), atol=1e-6)
    assert [len(texts) for texts in engine.seen] == [1, 8]


def test_a_full_server_refuses_at_once_and_answers_what_it_took() -> None:
    engine = HashEngine()
    engine.gate.clear()
    service = Service(engine, limits=Limits(queue=3, wait_ms=0))
    with served(service) as port, ThreadPoolExecutor(3) as pool:
        taken = [pool.submit(post, port, "/v1/embeddings", input=f"text {i}") for i in range(3)]
        until(lambda: service._places == 0)
        status, headers, answer = ask(port, "POST", "/v1/embeddings", {"input": "one more"})
        assert (status, headers["retry-after"], answer["error"]["type"]) == (503, "1", "overloaded_error")
        assert ask(port, "GET", "/health")[0] == 200
        engine.gate.set()
        found = [one.result(PATIENCE)["data"][0]["embedding"] for one in taken]
    assert np.allclose(found, known_vectors([f"text {i}" for i in range(3)]), atol=1e-6)


def test_a_client_that_went_away_is_dropped() -> None:
    engine = HashEngine()
    engine.gate.clear()
    service = Service(engine, limits=Limits(wait_ms=0))
    with served(service) as port, ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, port, "/v1/embeddings", input="first")
        assert engine.entered.wait(PATIENCE)
        body = b'{"input": "of nobody"}'
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: len(service.batcher._waiting) == 1)
            (job,) = service.batcher._waiting
        until(job.answer.cancelled)
        engine.gate.set()
        first.result(PATIENCE)
        assert post(port, "/v1/embeddings", input="last")
    assert engine.seen == [["first"], ["last"]]


def test_a_failure_of_the_model_is_one_line_for_one_client(caplog: pytest.LogCaptureFixture) -> None:
    engine = HashEngine()
    engine.gate.clear()
    service = Service(engine, limits=Limits(wait_ms=0))
    with served(service) as port, ThreadPoolExecutor(4) as pool:
        first = pool.submit(post, port, "/v1/embeddings", input="first")
        assert engine.entered.wait(PATIENCE)
        good = pool.submit(post, port, "/v1/embeddings", input="good")
        bad = pool.submit(ask, port, "POST", "/v1/embeddings", {"input": "explode"})
        until(lambda: len(service.batcher._waiting) == 2)
        engine.gate.set()
        status, _, answer = bad.result(PATIENCE)
        assert status == 500
        assert answer["error"]["type"] == "server_error"
        assert "anything" not in answer["error"]["message"]  # the words of the exception stay in the log
        assert np.allclose(good.result(PATIENCE)["data"][0]["embedding"], known_vectors(["good"])[0], atol=1e-6)
        first.result(PATIENCE)
        assert ask(port, "GET", "/health")[0] == 200
    assert "a model may raise anything" in caplog.text


def test_a_stop_answers_what_was_taken() -> None:
    engine = HashEngine()
    engine.gate.clear()
    service = Service(engine, limits=Limits(wait_ms=0))
    with ThreadPoolExecutor(4) as pool:
        with served(service) as port:
            taken = [pool.submit(post, port, "/v1/embeddings", input="text 0")]
            assert engine.entered.wait(PATIENCE)
            taken += [pool.submit(post, port, "/v1/embeddings", input=f"text {i}") for i in (1, 2)]
            until(lambda: len(service.batcher._waiting) == 2)
            service.server.should_exit = True  # type: ignore[attr-defined]
            until(lambda: not service.server.servers[0].is_serving())  # type: ignore[attr-defined]
            assert not any(one.done() for one in taken)
            engine.gate.set()
        found = [one.result(PATIENCE)["data"][0]["embedding"] for one in taken]
    assert np.allclose(found, known_vectors([f"text {i}" for i in range(3)]), atol=1e-6)
