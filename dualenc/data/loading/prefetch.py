"""Shards that lie elsewhere, fetched in the order of the plan before they are wanted."""

import threading
from collections import deque
from contextlib import suppress
from typing import Any

from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.shard import Shard
from dualenc.utils.errors import DataError
from dualenc.utils.urls import is_remote

AT_ONCE = 8  # transfers


class Prefetch:
    """A context in which threads keep the cache one window ahead of the batches that are handed out.

    A hint and no more: whoever reads a shard that is not there fetches it, and meets the errors. Where all shards are
    local, nothing is started.

    Args:
        plan: an `EpochPlan`; anything else has no windows, and nothing is fetched ahead.
        index: whose shards the plan counts.
        batch: the first one.

    Raises:
        DataError: one window takes more room than the cache has.
    """

    def __init__(self, plan: Any, index: ShardIndex, batch: int) -> None:
        self._plan, self._shards = plan, index.parts
        self._window, self._stop = -1, False
        self._todo: deque[Shard] = deque()
        self._keep: set[str] = set()
        self._wake = threading.Condition()
        self._ahead = hasattr(plan, "window_of") and any(is_remote(shard.url) for shard in index.parts)
        if self._ahead:
            self._check()
            self.reached(batch)

    def __enter__(self) -> "Prefetch":
        if self._ahead:  # they end with the process at the latest: nobody waits for a transfer that stalls
            for _ in range(AT_ONCE):
                threading.Thread(target=self._run, name="prefetch", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._wake:
            self._stop = True
            self._wake.notify_all()

    def reached(self, batch: int) -> None:
        """Tells which batch is being handed out."""
        if not self._ahead or (window := self._plan.window_of(batch)) == self._window:
            return
        now, room = self._elsewhere(window), 0
        if now:
            room = now[0].cache.limit - sum(shard.facts["size"] for shard in now)
        for shard in self._elsewhere(window + 1):
            room -= shard.facts["size"]
            if room >= 0:
                now.append(shard)
        with self._wake:
            self._window, self._todo, self._keep = window, deque(now), {shard.place.name for shard in now}
            self._wake.notify_all()

    def _elsewhere(self, window: int) -> list[Shard]:
        return [self._shards[i] for i in self._plan.shards_of(window) if is_remote(self._shards[i].url)]

    def _check(self) -> None:
        for window in range(self._plan.windows):
            shards = self._elsewhere(window)
            size = sum(shard.facts["size"] for shard in shards)
            if shards and size > (limit := shards[0].cache.limit):
                raise DataError(
                    f"data.cache_gb {limit / 1e9:.3g}: the {len(shards)} shards of one window take "
                    f"{size / 1e9:.3g} GB: raise it, or lower data.window"
                )

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stop or self._todo)
                if self._stop:
                    return
                shard, keep = self._todo.popleft(), self._keep
            with suppress(DataError, OSError):  # met again, and told, by whoever reads it
                shard.cache.path(shard.place, keep)
