"""Batching: requests that wait are computed together, by one thread that owns the model."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from dualenc.search.service.refusals import busy


@dataclass(eq=False)
class Job:
    """A request to the model.

    Attributes:
        items: what is to be embedded, by kind; see `Service.compute`.
        search: what is to be searched for with the embeddings; None to return them.
        answer: the result; a caller that went away cancels it.
    """

    items: dict[str, list[Any]]
    search: Any = None
    answer: Future[Any] = field(default_factory=Future)

    def __len__(self) -> int:
        return sum(map(len, self.items.values()))


class Batcher:
    """A queue of jobs, and the thread that computes them in batches.

    Args:
        compute: function that computes jobs together, and returns for each its result or the exception that it failed
            with; if it raises, each job is computed alone, so that a job fails no other.
        max_batch: items of a batch; a job with more is a batch of its own.
        wait: seconds for which the first job of a batch waits for others.
        limit: largest number of jobs that wait.
    """

    def __init__(
        self, compute: Callable[[Sequence[Job]], Sequence[Any]], max_batch: int, wait: float, limit: int
    ) -> None:
        self.compute, self.max_batch, self.wait, self.limit = compute, max_batch, wait, limit
        self.batches = 0  # number of batches so far
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="dualenc-model", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> Future[Any]:
        """Append a job to the queue, and return its answer to wait for.

        Raises:
            Refusal: If the queue is full, or the service stops.
        """
        with self._changed:
            if self._closed:
                raise busy("the server stops")
            if len(self._waiting) >= self.limit:
                raise busy(f"{self.limit} requests wait already: try again")
            self._waiting.append(job)
            self._changed.notify()
        return job.answer

    def close(self) -> None:
        """Compute what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._take():
            # The answer of a job whose caller went away is canceled: it is not computed.
            if jobs := [job for job in jobs if job.answer.set_running_or_notify_cancel()]:
                self.batches += 1
                self._answer(jobs)

    def _take(self) -> list[Job]:
        """Wait for jobs, and remove those of the next batch from the queue; none once it is closed and empty."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            end = time.monotonic() + self.wait
            while sum(map(len, self._waiting)) < self.max_batch and not self._closed:
                if (left := end - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
            jobs: list[Job] = []
            size = 0
            while self._waiting and (not jobs or size + len(self._waiting[0]) <= self.max_batch):
                jobs.append(self._waiting.popleft())
                size += len(jobs[-1])
            return jobs

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Compute jobs and set their answers."""
        try:
            results = self.compute(jobs)
        except Exception as error:  # of a model, which may raise anything
            if len(jobs) > 1:
                for job in jobs:
                    self._answer([job])
                return
            results = [error]
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, Exception):
                job.answer.set_exception(result)
            else:
                job.answer.set_result(result)
