"""Prefetching of remote shards into the cache, in the order in which the epoch plan reads them."""

import threading
from collections import deque
from contextlib import suppress
from typing import Any

from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.shard import Shard
from dualenc.utils.errors import DataError
from dualenc.utils.urls import is_remote

THREADS = 8  # concurrent transfers


class Prefetch:
    """Context manager whose threads keep the cache one window ahead of the batches that are handed out.

    It saves time only. The reader of a shard that is not in the cache yet fetches the shard itself, and raises the
    errors of the transfer. If all shards are local, no thread is started.

    Args:
        plan: an `EpochPlan`; other plans have no windows, and nothing is prefetched for them.
        index: index of the shards that the plan numbers.
        batch: number of the first batch.

    Raises:
        DataError: If the shards of one window are larger than the cache.
    """

    def __init__(self, plan: Any, index: ShardIndex, batch: int) -> None:
        self._plan, self._shards = plan, index.parts
        self._window, self._stop = -1, False
        self._queue: deque[Shard] = deque()
        self._keep: set[str] = set()  # files that the cache must not remove to make room
        self._changed = threading.Condition()  # guards the fields above; notified when they change
        self._enabled = hasattr(plan, "window_of") and any(is_remote(shard.url) for shard in index.parts)
        if self._enabled:
            self._check_cache_size()
            self.advance_to(batch)

    def __enter__(self) -> "Prefetch":
        if self._enabled:  # daemon threads, so that the process does not wait for a stalled transfer when it exits
            for _ in range(THREADS):
                threading.Thread(target=self._run, name="prefetch", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()

    def advance_to(self, batch: int) -> None:
        """Schedule the shards of the window of a batch that is handed out, and as many of the next window as fit."""
        if not self._enabled or (window := self._plan.window_of(batch)) == self._window:
            return
        wanted, room = self._remote_shards(window), 0
        if wanted:
            room = wanted[0].cache.limit - sum(shard.facts["size"] for shard in wanted)
        for shard in self._remote_shards(window + 1):
            room -= shard.facts["size"]
            if room >= 0:
                wanted.append(shard)
        with self._changed:
            self._window, self._queue = window, deque(wanted)
            self._keep = {shard.remote_file.name for shard in wanted}
            self._changed.notify_all()

    def _remote_shards(self, window: int) -> list[Shard]:
        """Return the remote shards of a window in the order of the plan."""
        return [self._shards[i] for i in self._plan.shards_of(window) if is_remote(self._shards[i].url)]

    def _check_cache_size(self) -> None:
        """Raise if the cache is too small for a window, whose shards would remove each other."""
        for window in range(self._plan.windows):
            shards = self._remote_shards(window)
            size = sum(shard.facts["size"] for shard in shards)
            if shards and size > (limit := shards[0].cache.limit):
                raise DataError(
                    f"data.cache_gb {limit / 1e9:.3g}: the {len(shards)} shards of one window take "
                    f"{size / 1e9:.3g} GB: raise data.cache_gb, or lower data.window"
                )

    def _run(self) -> None:
        """Fetch queued shards until the context ends; this is the body of each thread."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stop or self._queue)
                if self._stop:
                    return
                shard, keep = self._queue.popleft(), self._keep
            with suppress(DataError, OSError):  # the reader of this shard meets the error again and raises it
                shard.cache.path(shard.remote_file, keep)
