"""Threads of a worker, and tasks that go on whatever the host refuses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from pkernfs.server.resources import REFUSALS, Attempt, ResourceError, asking, backoff, refusal

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: object) -> T:
    """What a function gives that may wait for the kernel, in a thread; where none is to be had, as soon as one is.

    What it raises itself is its own, and not tried again.
    """
    attempt = Attempt("thread")

    def call() -> tuple[T | None, BaseException | None]:
        try:
            return function(*args), None
        except BaseException as error:
            return None, error

    while True:
        try:
            with asking("a thread"):
                result, error = await trio.to_thread.run_sync(call, abandon_on_cancel=True)
            break
        except ResourceError as refused:
            attempt.refused(refused)
            await trio.sleep(backoff(attempt.failures))
    attempt.succeeded()
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # there was no error


async def enduring(what: str, task: Callable[[], Awaitable[None]]) -> None:
    """A task beside the requests: when the host refuses it something it starts again, and ends no worker."""
    attempt = Attempt(what, "goes on without")
    while True:
        try:
            return await task()
        except (ResourceError, *REFUSALS) as error:
            attempt.refused(error if isinstance(error, ResourceError) else refusal(what, error))
        await trio.sleep(backoff(attempt.failures))
