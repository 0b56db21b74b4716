"""Reading of requests within limits of size and time, and the end of the work for a client that went away."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from dualenc.search.service.core import MIB, Limits
from dualenc.search.service.refusals import Refusal, busy

T = TypeVar("T")


class BodyReader:
    """A reader of bodies with a limit for each and for all that are in memory at once.

    Args:
        limits: limits of the service.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.held = limits, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read the body of a request, which counts as held until the block ends.

        Raises:
            Refusal: If it is not declared as JSON, is too large or too slow, or there is no room for it.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # A page of another site can send other types without asking the server first.
        if kind != "application/json":
            raise Refusal(415, "send the header Content-Type: application/json")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Refusal(415, "send the body without a Content-Encoding")
        chunks: list[bytes] = []
        try:
            await self._fill(request, chunks)
            yield b"".join(chunks)
        finally:
            self.held -= sum(map(len, chunks))

    async def _fill(self, request: Request, chunks: list[bytes]) -> None:
        """Append the parts of a body as they come; see `read`."""
        limits = self.limits
        too_large = Refusal(413, f"the body is larger than {limits.max_body / MIB:g} MiB")
        declared = request.headers.get("content-length", "0")
        if not declared.isdigit() or int(declared) > limits.max_body:
            raise too_large
        size = 0
        try:
            async with asyncio.timeout(limits.patience):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > limits.max_body:
                        raise too_large
                    if self.held + len(chunk) > limits.bodies:
                        raise busy("the bodies of other requests fill the memory for them: try again")
                    self.held += len(chunk)
                    chunks.append(chunk)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {limits.patience:g} seconds") from None
        except ClientDisconnect:
            raise Refusal(400, "the connection ended before the body did") from None


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Run the work for a client, or drop it when the client goes away.

    Args:
        request: the request, whose body was read.
        work: the work.

    Raises:
        Refusal: If the client went away, for nobody to read.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal(400, "the client went away")
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _disconnected(request: Request) -> None:
    """Wait until the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
