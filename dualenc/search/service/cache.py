"""A cache of bytes with a bounded size."""

from collections import OrderedDict
from collections.abc import Hashable


class BytesCache:
    """A cache that forgets what was not used for longest. One thread uses it.

    Args:
        limit: largest number of bytes that are kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()

    def get(self, key: Hashable) -> bytes | None:
        """Return what is kept under a key, or None."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Hashable, content: bytes) -> None:
        """Keep bytes under a key."""
        self.size += len(content) - len(self._kept.pop(key, b""))
        self._kept[key] = content
        while self.size > self.limit:
            self.size -= len(self._kept.popitem(last=False)[1])
