"""Ends the work for a request as soon as its client closes the connection."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

CLIENT_LEFT = 499  # status for the log and the metrics; no client receives it

_Result = TypeVar("_Result")


class ClientLeftError(Exception):
    """The client has closed its connection."""


async def unless_client_leaves(request: Request, work: Awaitable[_Result]) -> _Result:
    """The result of `work`, whose request must have been read.

    Raises:
        ClientLeftError: the client left first; the work is cancelled.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeftError
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
