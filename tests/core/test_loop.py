"""What pyfuse3's session loop gets in place of trio's lock and wait: it gives way, wakes, and can be cancelled."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
import trio
import trio.testing

from pkernfs.server.loop import PASS_EVERY, SPINS, PollingLowlevel, UnfairLock


class Session:
    """Counts."""

    def __init__(self) -> None:
        self.reads = 0
        self.headers: list[bytes] = []

    def before_read(self) -> None:
        self.reads += 1

    def relayed(self, header: bytes) -> None:
        self.headers.append(header)


class Ends:
    """A keeper's relay, and a pipe in place of the device."""

    def __init__(self) -> None:
        self.session = Session()
        self.relay, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.fd = theirs.detach()
        reading, self.writing = os.pipe()
        self.lowlevel = PollingLowlevel(self.fd, reading, self.session)

    async def connect(self) -> None:
        """Let the device take the place of the relay, with something to read."""
        self.relay.close()
        os.write(self.writing, b"x")
        await self.lowlevel.wait_readable(self.fd)

    def close(self) -> None:
        self.relay.close()
        for fd in (self.fd, self.writing):
            with suppress(OSError):
                os.close(fd)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def test_the_device_takes_the_place_of_the_relay(ends: Ends) -> None:
    async def main() -> None:
        ends.relay.send(b"request")
        await ends.lowlevel.wait_readable(ends.fd)
        assert ends.session.headers == [b"request"]
        assert os.read(ends.fd, 100) == b"request"
        await ends.connect()
        assert ends.session.headers == [b"request", b""]
        assert os.read(ends.fd, 100) == b"x"
        assert ends.session.reads == 2

    trio.run(main)


def test_others_run_beside_a_busy_connection(ends: Ends) -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async def main() -> None:
        await ends.connect()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(10 * PASS_EVERY):
                await ends.lowlevel.wait_readable(ends.fd)
            nursery.cancel_scope.cancel()

    trio.run(main)
    assert 5 <= turns <= 20


def test_an_idle_connection_wakes_and_can_be_cancelled(ends: Ends) -> None:
    async def main() -> None:
        await ends.connect()
        os.read(ends.fd, 100)
        with trio.move_on_after(0.01) as scope:
            await ends.lowlevel.wait_readable(ends.fd)
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ends.lowlevel.wait_readable, ends.fd)
            await trio.testing.wait_all_tasks_blocked()
            os.write(ends.writing, b"y")
        assert os.read(ends.fd, 100) == b"y"

    trio.run(main)


def test_spinning_ends_where_it_finds_nothing(ends: Ends) -> None:
    polls: list[int] = []

    class Poll:
        """Finds something when the wait is not 0."""

        def poll(self, timeout: int) -> bool:
            polls.append(timeout)
            return timeout > 0

    async def main() -> None:
        await ends.connect()
        ends.lowlevel._poll = Poll()  # type: ignore[assignment]
        counts = []
        for _ in range(PASS_EVERY):
            polls.clear()
            await ends.lowlevel.wait_readable(ends.fd)
            counts.append(len(polls) - 1)
        assert counts[:3] == [SPINS, SPINS // 2, SPINS // 4]
        assert counts[20:-2] == [0] * (PASS_EVERY - 22)
        assert SPINS in counts[-2:]

    trio.run(main)


def test_lock() -> None:
    """One at a time; who waits comes in their order, but for those that were cancelled."""
    order: list[int] = []
    lock = UnfairLock()

    async def use(number: int) -> None:
        async with lock:
            order.append(number)
            await trio.lowlevel.checkpoint()
            order.append(number)

    async def main() -> None:
        async with trio.open_nursery() as nursery, lock:
            for number in range(4):
                nursery.start_soon(use, number)
                await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0.001) as impatient:
                await use(9)
            assert impatient.cancelled_caught

    trio.run(main)
    assert order == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_free_lock_does_not_yield() -> None:
    async def main() -> None:
        lock = UnfairLock()
        ran: list[int] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ran_soon, ran)
            async with lock:
                assert not ran

    async def ran_soon(ran: list[int]) -> None:
        ran.append(1)

    trio.run(main)
