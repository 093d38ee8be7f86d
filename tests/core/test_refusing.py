"""Requests that nobody can serve: each is answered or needs no answer, and nothing that the kernel says is lost."""

import errno
import mmap
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from pkernfs.format import Ino
from pkernfs.fs.lookups import Lookups, lookups_size
from pkernfs.server.child import RegionLostError, WorkerError, WorkerGoneError
from pkernfs.server.device import BATCH_FORGET, FORGET, INTERRUPT, OPCODES, REPLY, REQUEST, Device, Request
from pkernfs.server.refusing import PATIENCE, RESOURCES, Refusing

MiB = 1 << 20


class Rig:
    """A socket that stands for /dev/fuse, the kernel's end of it, and what keeps requests from being served."""

    def __init__(self) -> None:
        self.kernel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.kernel.setblocking(False)
        self.wakeup, self.waker = socket.socketpair()
        self.device = Device(theirs.detach())
        self.region = os.memfd_create("region")
        os.truncate(self.region, 8 * MiB)
        self.references = os.memfd_create("references")
        os.truncate(self.references, lookups_size(8 * MiB))
        self.refusing = Refusing(self.region, self.references)

    def request(self, opcode: int, unique: int = 10, nodeid: int = 1, body: bytes = b"") -> None:
        header = Request(REQUEST.size + len(body), opcode, unique, nodeid, 0, 0, 1, 0)
        self.kernel.send(REQUEST.pack(header) + body)

    def replies(self) -> list[tuple[int, int]]:
        """(unique, error) of each so far; notifications have unique 0."""
        found: list[tuple[int, int]] = []
        while True:
            try:
                reply = REPLY.unpack(self.kernel.recv(100))
            except BlockingIOError:
                return found
            found.append((reply.unique, -reply.error))

    def lost(self, times: int = PATIENCE, error: Exception | None = None) -> None:
        for _ in range(times):
            self.refusing.note(error or RegionLostError("the region is gone"), self.device)

    def serve(self, seconds: float = 0.0) -> bool:
        return self.refusing.serve(self.device, self.wakeup, seconds)

    def close(self) -> None:
        for one in (self.kernel, self.wakeup, self.waker):
            one.close()
        for fd in (self.device.fd, self.region, self.references):
            os.close(fd)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


@pytest.mark.parametrize("opcode", OPCODES, ids=OPCODES.values())
def test_every_request_is_answered_or_needs_none(rig: Rig, opcode: int) -> None:
    rig.lost()
    assert rig.replies() == [(0, -7)]  # the kernel is asked to deliver again what dead workers had
    rig.request(opcode, body=bytes(16))
    assert not rig.serve()
    assert rig.replies() == ([] if opcode in (FORGET, INTERRUPT, BATCH_FORGET) else [(10, errno.EIO)])


@pytest.mark.parametrize("times", range(PATIENCE))
def test_one_failure_is_not_enough(rig: Rig, times: int) -> None:
    """The next worker may fare better, so everybody waits."""
    rig.lost(times)
    rig.request(3)
    assert not rig.serve()
    assert (rig.replies(), rig.refusing.why) == ([], "")


def test_what_the_host_refuses_is_no_fault_of_the_region(rig: Rig) -> None:
    for number in RESOURCES:
        error = RegionLostError("cannot open the region")
        error.errno = number
        rig.lost(9, error)
    rig.lost(9, WorkerGoneError("worker 1 has ended"))
    rig.lost(9, WorkerError("worker 1: expected protocol 1"))
    rig.lost(9, OSError(errno.EAGAIN, "fork"))
    assert rig.refusing.why == ""


def test_what_the_kernel_gives_up_is_counted(rig: Rig) -> None:
    lookups = Lookups(8 * MiB, mmap.mmap(rig.references, 0))
    for ino in (20, 21, 22):
        for _ in range(ino):
            lookups.add(Ino(ino))
    rig.lost()
    rig.request(FORGET, nodeid=20, body=struct.pack("<Q", 5))
    rig.request(BATCH_FORGET, body=struct.pack("<IIQQQQ", 2, 0, 21, 6, 22, 22))
    rig.request(FORGET, nodeid=1 << 60, body=struct.pack("<Q", 5))
    assert not rig.serve()
    assert [lookups[Ino(ino)] for ino in (20, 21, 22)] == [15, 15, 0]


def test_it_is_looked_again_when_the_file_has_another_size(rig: Rig) -> None:
    rig.lost()
    assert not rig.serve()
    os.truncate(rig.region, 4 * MiB)
    assert rig.serve()
    assert not rig.serve()


def test_it_ends_with_a_worker_that_serves_or_with_the_mount(rig: Rig) -> None:
    rig.lost()
    assert rig.refusing.why == "the region is gone"
    rig.waker.send(b"x")
    assert not rig.serve(60.0)  # a signal, or a command
    rig.refusing.end()
    assert rig.refusing.why == ""
    rig.lost(1)
    assert rig.refusing.why == ""
