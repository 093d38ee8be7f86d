"""The control sockets: nobody but the owner of the mount and root gets an answer, and no client hurts the server."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
from trio.testing import MockClock

from pkernfs import api
from pkernfs.api import API_VERSION, PATIENCE, VERBS, Server
from pkernfs.client import keeper_address
from pkernfs.codec import LINE_MAX
from pkernfs.server import commands
from pkernfs.server.commands import Commands
from pkernfs.server.control import ControlSocket
from pkernfs.sockets import CONNECTIONS, listen, remove, remove_stale
from tests.mount.site import MiB, Site, run

ROOT = Path(__file__).parents[2]

#: A client with another identity: connects, sends standard input, prints the replies.
CLIENT = """
import os, socket, sys
os.setgroups([])
os.setresgid(1000, 1000, 1000)
os.setresuid(1000, 1000, 1000)
with socket.socket(socket.AF_UNIX) as client:
    client.connect(sys.argv[1])
    try:
        client.sendall(sys.stdin.buffer.read())
        client.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionResetError):
        pass
    try:
        while data := client.recv(65536):
            sys.stdout.write(data.decode())
    except ConnectionResetError:  # what follows a reply when not all was read that was sent
        pass
"""


def test_the_path_of_the_control_socket(site: Site) -> None:
    address = Path(os.fsdecode(os.getxattr(site.mnt, "user.pkernfs.control")))
    socket_mode, folder = address.lstat(), address.parent.lstat()
    assert (stat.S_ISSOCK(socket_mode.st_mode), stat.S_IMODE(socket_mode.st_mode), socket_mode.st_uid) == (
        True,
        0o600,
        0,
    )
    assert (stat.S_ISDIR(folder.st_mode), folder.st_mode & 0o022, folder.st_uid) == (True, 0, 0)
    result = run(sys.executable, "-c", CLIENT, address)
    assert "PermissionError" in result.stderr
    site.crash()
    site.mount()
    assert not address.exists(), "the socket of a killed server is still there"


Serve = Callable[..., None]


@pytest.fixture
def served() -> Iterator[Serve]:
    """Run a function beside a control socket whose path is open to everybody: ``served(function)``."""
    with tempfile.TemporaryDirectory(prefix="pkernfs-test-", dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        path = os.path.join(folder, "control.sock")

        async def verb(_: api.Info) -> dict[str, Any]:
            return {"done": True}

        async def main(function: Callable[[str], Awaitable[object]]) -> None:
            listener = ControlSocket(listen(path), {api.Info: verb})
            os.chmod(path, 0o666)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(listener.serve)
                    await function(path)
                    nursery.cancel_scope.cancel()
            finally:
                remove(path)

        yield lambda function, clock=None: trio.run(main, function, clock=clock)
        assert os.listdir(folder) == []


async def talk(path: str, data: bytes) -> bytes:
    """What the owner gets for an answer."""
    stream = await trio.open_unix_socket(path)
    async with stream:
        await stream.send_all(data)
        await stream.send_eof()
        return b"".join([chunk async for chunk in stream])


async def send_until_broken(stream: trio.SocketStream, data: bytes) -> int:
    """Send it again and again until the other side closes; how many bytes that were."""
    sent = 0
    with suppress(trio.BrokenResourceError):
        while True:
            await stream.send_all(data)
            sent += len(data)
    return sent


def test_other_users_are_refused_every_verb(served: Serve) -> None:
    """Also where they can reach the socket: the peer's credentials decide."""

    async def check(path: str) -> None:
        for data in (b'{"verb": "info"}\n' * 2, b"garbage\n", b"", b"x" * 10 * LINE_MAX):
            command = [sys.executable, "-c", CLIENT, path]
            done = await trio.run_process(command, stdin=data, capture_stdout=True)
            replies = done.stdout.splitlines()
            assert len(replies) == 1
            assert json.loads(replies[0])["errno"] == errno.EPERM
        assert json.loads(await talk(path, b'{"verb": "info"}\n')) == {"result": {"done": True}}

    served(check)


def test_a_line_without_an_end_is_not_read_on(served: Serve) -> None:
    """The server takes little of it, whatever a client sends."""

    async def check(path: str) -> None:
        async with await trio.open_unix_socket(path) as stream:
            assert await send_until_broken(stream, b"x" * LINE_MAX) < 16 * MiB
            assert json.loads(await stream.receive_some())["errno"] == errno.E2BIG
            assert json.loads(await talk(path, b'{"verb": "info"}\n')) == {"result": {"done": True}}

    served(check)


@pytest.mark.parametrize(
    "data", [b"", b'{"verb": ', b'{"verb": "info"}\n'], ids=["silent", "half-a-line", "then-silent"]
)
def test_a_client_that_says_no_more_is_dropped(served: Serve, data: bytes) -> None:
    async def check(path: str) -> None:
        async with await trio.open_unix_socket(path) as stream:
            if data:
                await stream.send_all(data)
            replies = b"".join([chunk async for chunk in stream])
            assert replies.count(b"\n") == data.count(b"\n")
            assert trio.current_time() >= PATIENCE

    served(check, MockClock(autojump_threshold=0.05))


def test_a_client_that_does_not_listen_is_dropped(served: Serve) -> None:
    async def check(path: str) -> None:
        async with await trio.open_unix_socket(path) as stream:
            await send_until_broken(stream, b"\n" * LINE_MAX)
            assert json.loads(await talk(path, b'{"verb": "info"}\n')) == {"result": {"done": True}}

    served(check, MockClock(autojump_threshold=0.05))


def test_too_many_connections_are_refused(served: Serve) -> None:
    async def check(path: str) -> None:
        streams = [await trio.open_unix_socket(path) for _ in range(CONNECTIONS)]
        for stream in streams:
            await stream.send_all(b'{"verb": "info"}\n')
            assert json.loads(await stream.receive_some()) == {"result": {"done": True}}
        async with await trio.open_unix_socket(path) as refused:
            assert json.loads(await refused.receive_some())["errno"] == errno.EAGAIN
            assert await refused.receive_some() == b""
        for stream in streams:
            await stream.aclose()
        while "error" in (answer := json.loads(await talk(path, b'{"verb": "info"}\n'))):
            await trio.lowlevel.checkpoint()
        assert answer == {"result": {"done": True}}

    served(check)


WORDS: list[object] = [None, True, -1, 0, 1, 1 << 40, 1 << 70, 1.5, 1e300, "", "x" * 1000, [], {}, [[]], "\ud800"]


#: What a reply may consist of: a result; an error, with what to do next, and what is known where something was not.
REPLIES = ({"result"}, {"error", "errno"}, {"error", "errno", "hint"}, {"error", "errno", "hint", "known"})


def address_of(site: Site, server: Server) -> str | bytes:
    """One of the two sockets of a mount."""
    if server is Server.WORKER:
        return os.getxattr(site.mnt, "user.pkernfs.control")
    return keeper_address(str(site.mnt))


class Lines:
    """A connection to a control socket, by hand."""

    def __init__(self, site: Site, server: Server) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        self.socket.connect(address_of(site, server))
        self.lines = self.socket.makefile("rb")

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.close()
        self.socket.close()

    def say(self, line: bytes | dict[str, Any]) -> dict[str, Any]:
        """The reply to a line."""
        self.socket.sendall((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n")
        reply: dict[str, Any] = json.loads(self.lines.readline())
        assert set(reply) in REPLIES, (line, reply)
        return reply


@pytest.mark.parametrize("verb", ["info", "file", "direct", "scrub", "quota", "nonsense"])
def test_words_that_no_verb_knows(shared: Site, verb: str) -> None:
    """An answer to each, and no complaint in the log."""
    with Lines(shared, Server.WORKER) as client:
        for key in ("ino", "block", "on", "verb"):
            for word in WORDS:
                client.say({"verb": verb, "ino": 1, "block": 0, key: word})
                client.say({"verb": verb, "ino": 1, key: word})
        for line in (b"", b"\xff", b"null", b"1" * 5000, b"[" * 60_000, b'{"verb": NaN}', b"{" * 60_000):
            assert client.say(line)["errno"] in (errno.EINVAL, errno.EOPNOTSUPP)
    assert shared.complaints() == []


def test_words_in_every_field(site: Site) -> None:
    """Of every verb but the one that ends with another keeper: an answer to each, and no complaint in the log."""
    for server in Server:
        with Lines(site, server) as client:
            for verb in (verb for verb in VERBS.values() if verb.server is server and verb.name != "hand-over"):
                for field in verb.fields:
                    for word in WORDS:
                        client.say({"verb": verb.name, field: word})
                        client.say({"verb": verb.name, **({"ino": 1} if "ino" in verb.fields else {}), field: word})
    assert site.complaints() == []


# -- what a reply says of what it does not know, on both sockets -------------------------------------------------------

EACH_SERVER = pytest.mark.parametrize("server", Server, ids=lambda server: server.value)
KNOWN = {server: [name for name, verb in VERBS.items() if verb.server is server] for server in Server}
#: Server -> a request to it that is right.
RIGHT: dict[Server, dict[str, Any]] = {
    Server.WORKER: {"verb": "file", "ino": 1 << 40},
    Server.KEEPER: {"verb": "upgrade", "command": ["/nowhere"], "probation": 1},
}


@EACH_SERVER
def test_what_is_known_is_told(shared: Site, server: Server) -> None:
    """For a verb, a field, a version that is not known."""
    right = RIGHT[server]
    verb = VERBS[right["verb"]]
    with Lines(shared, server) as client:
        for verbs in ({"verb": "inof"}, {"verb": KNOWN[next(one for one in Server if one is not server)][0]}):
            reply = client.say(verbs)
            assert (reply["errno"], reply["known"]) == (errno.EOPNOTSUPP, KNOWN[server])
            assert json.dumps(verbs["verb"]) in reply["error"]
            assert ", ".join(KNOWN[server]) in reply["hint"]
        reply = client.say(right | {"colour": 1})
        assert (reply["errno"], reply["known"]) == (errno.EINVAL, verb.fields)
        assert f'{verb.name}: no field "colour"' in reply["error"]
        for version in (API_VERSION + 1, 0, "1", None, [1]):
            reply = client.say(right | {"version": version})
            assert (reply["errno"], reply["known"]) == (errno.EPROTONOSUPPORT, [str(API_VERSION)])
    assert shared.complaints() == []


@EACH_SERVER
def test_wrong_types_are_named(shared: Site, server: Server) -> None:
    """The field and what was expected of it."""
    of_worker: dict[str, list[Any]] = {"ino": ["1", 1.5, True, -1, 1 << 60, 1 << 64, None, []]}
    of_keeper: dict[str, list[Any]] = {
        "command": ["/bin/false", [], [1], None],
        "probation": ["5", -1, 3601, None],
    }
    wrong = of_worker if server is Server.WORKER else of_keeper
    with Lines(shared, server) as client:
        for field, words in wrong.items():
            for word in words:
                reply = client.say(RIGHT[server] | {field: word})
                assert reply["errno"] == errno.EINVAL
                assert f'"{field}' in reply["error"], reply
                assert "xpected" in reply["error"]
        left_out = {"verb": "iommu-unmap", "ino": 1} if server is Server.WORKER else {"verb": "upgrade"}
        assert "missing required field" in client.say(left_out)["error"]
    assert shared.complaints() == []


@EACH_SERVER
def test_lines_that_do_not_end(shared: Site, server: Server) -> None:
    """Too long: refused, and the connection ends.  Half of one: no answer, and it does nothing."""
    with Lines(shared, server) as client:
        with suppress(ConnectionError):
            client.socket.sendall(b"x" * (LINE_MAX + 1))
        assert json.loads(client.lines.readline())["errno"] == errno.E2BIG
        with suppress(ConnectionResetError):
            assert client.lines.readline() == b""
    with Lines(shared, server) as client:
        client.socket.sendall(b'{"verb": "info"')
        client.socket.shutdown(socket.SHUT_WR)
        assert client.lines.readline() == b""
    assert shared.complaints() == []


@EACH_SERVER
def test_several_lines_at_once(shared: Site, server: Server) -> None:
    """One after the other, however they come."""
    line = b'{"verb": "status"}\n' if server is Server.KEEPER else b'{"verb": "info", "version": 1}\n'
    with Lines(shared, server) as client:
        for piece in (line[:5], line[5:] + line + line[:3], line[3:]):
            client.socket.sendall(piece)
        for _ in range(3):
            assert json.loads(client.lines.readline())["result"]["region"] == str(shared.region)


def test_a_client_of_the_first_release(site: Site) -> None:
    """What pkernfs 0.1 sends, which knows no versions, is answered still; and as it expects it."""
    (site.mnt / "file").write_bytes(b"x" * 8192)
    with Lines(site, Server.WORKER) as client:
        folder, file = ((site.mnt / name).stat().st_ino for name in ("iommu", "file"))
        assert client.say({"verb": "info", "ino": 1})["result"]["region"] == str(site.region)
        make = {"verb": "iommu", "ino": folder, "op": "create", "request": (1 << 64) - 1, "name": "d", "levels": 4}
        domain = client.say(make | {"format": "vtd"})["result"]["ino"]
        assert client.say(make | {"format": "vtd"})["result"]["ino"] == domain, "it was made once"
        words = {"verb": "iommu", "ino": domain, "request": 7, "iova": 0}
        mapped = client.say(words | {"op": "map", "file_ino": file, "offset": 0, "length": 0, "access": "rw"})["result"]
        assert (mapped["length"], mapped["entries"], mapped["stale"]) == (8192, 2, [])
        listed = client.say({"verb": "iommu", "op": "iotlb-needed", "ino": 1, "request": 8, "done": False, "token": 0})
        assert listed["result"] == {"stale": [], "token": 0, "freed": 0, "awaiting": 0, "released": 0}
        done = client.say({"verb": "iommu", "op": "iotlb-needed", "ino": 1, "request": 9, "done": True, "token": 5})
        assert done["errno"] == errno.EAGAIN
        assert client.say({"verb": "iommu", "op": "audit", "ino": 1, "request": 10})["result"]["problems"] == []
        assert client.say({"verb": "iommu", "op": "nonsense", "ino": 1})["errno"] == errno.EOPNOTSUPP


# -- the keeper's: threads --------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[str]:
    """The path of a keeper's socket, whose keeper has nothing to tell."""
    path = str(tmp_path / "0.keeper.sock")
    listener = listen(path)

    def status() -> api.Status:
        raise RuntimeError("nothing to tell")

    Commands(listener.fileno(), status, lambda: None)
    yield path
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def connected(path: str) -> socket.socket:
    """A client of the keeper."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(20)
    client.connect(path)
    return client


@pytest.mark.parametrize("data", [b"", b'{"verb": ', b'{"verb": "nonsense"}\n'], ids=["silent", "half", "then-silent"])
def test_a_client_of_the_keeper_that_says_no_more_is_dropped(
    kept: str, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "PATIENCE", 0.2)
    with connected(kept) as client:
        client.sendall(data)
        with client.makefile("rb") as lines:
            assert lines.read().count(b"\n") == data.count(b"\n")


def test_too_many_connections_to_the_keeper_are_refused(kept: str) -> None:
    clients = [connected(kept) for _ in range(CONNECTIONS)]
    for client in clients:
        client.sendall(b"x\n")
        assert b"error" in client.recv(1 << 16)
    with connected(kept) as refused, refused.makefile("rb") as lines:
        assert json.loads(lines.readline())["errno"] == errno.EAGAIN
        assert lines.read() == b""
    for client in clients:
        client.close()


def test_a_bug_of_the_keeper_is_answered(kept: str, caplog: pytest.LogCaptureFixture) -> None:
    with connected(kept) as client:
        client.sendall(b'{"verb": "status"}\n')
        assert json.loads(client.recv(1 << 16))["errno"] == errno.EIO
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_stale_sockets_only_are_removed(tmp_path: Path) -> None:
    kept = [tmp_path / "alive.sock", tmp_path / "file.sock", tmp_path / "folder.sock", tmp_path / "begun"]
    alive, dead, begun = (socket.socket(socket.AF_UNIX) for _ in range(3))
    with alive, begun:
        with dead:
            dead.bind(str(tmp_path / "dead.sock"))
        alive.bind(str(kept[0]))
        alive.listen(1)
        kept[1].touch()
        kept[2].mkdir()
        begun.bind(str(kept[3]))
        remove_stale(str(tmp_path))
        remove_stale(str(tmp_path))
        remove_stale(str(tmp_path))
    assert sorted(tmp_path.iterdir()) == sorted([kept[0], kept[2], kept[3]])


RUNTIME = """
import os, sys
from pkernfs.sockets import runtime_dir
uid = int(sys.argv[1])
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
print(runtime_dir())
print(runtime_dir())
"""


def other_owner(path: Path, uid: int) -> None:
    path.mkdir(mode=0o777)
    os.chown(path, uid + 1, uid + 1)


def link_to_a_good_one(path: Path, uid: int) -> None:
    target = path.with_name(path.name + "-target")
    target.mkdir(mode=0o700)
    os.chown(target, uid, uid)
    path.symlink_to(target)


def open_to_others(path: Path, uid: int) -> None:
    path.mkdir()
    os.chown(path, uid, uid)
    path.chmod(0o777)


ATTACKS: dict[str, Callable[[Path, int], object]] = {
    "other-owner": other_owner,
    "link": link_to_a_good_one,
    "dangling-link": lambda path, uid: path.symlink_to("nowhere"),
    "open": open_to_others,
    "file": lambda path, uid: path.touch(),
}


def runtime_dirs(uid: int, xdg: str | None) -> list[Path]:
    """What the servers of a user take, in an environment with this XDG_RUNTIME_DIR; the first two are asked."""
    environment = {name: value for name, value in os.environ.items() if name != "XDG_RUNTIME_DIR"}
    if xdg is not None:
        environment["XDG_RUNTIME_DIR"] = xdg
    command = [sys.executable, "-c", RUNTIME, str(uid)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(line) for line in done.stdout.splitlines()]


@pytest.fixture
def uid() -> Iterator[int]:
    """A user that nothing else runs as; what is left of theirs in /tmp is removed."""
    number = 1_000_000 + os.getpid()
    yield number
    for path in Path("/tmp").glob(f"pkernfs-{number}*"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("where", ["tmp", "xdg"])
def test_a_prepared_path_is_not_used(uid: int, attack: Callable[[Path, int], object], where: str) -> None:
    """Whatever others have put there before: the directory is another one, made for this user alone."""
    if where == "tmp":
        xdg = None
        prepared = Path(f"/tmp/pkernfs-{uid}")
    else:
        parent = Path(f"/tmp/pkernfs-{uid}-xdg")
        parent.mkdir()
        parent.chmod(0o1777)
        xdg = str(parent)
        prepared = parent / "pkernfs"
    attack(prepared, uid)
    found = runtime_dirs(uid, xdg)[0]
    assert found != prepared
    status = found.lstat()
    assert (stat.S_ISDIR(status.st_mode), stat.S_IMODE(status.st_mode), status.st_uid) == (True, 0o700, uid)
    assert not prepared.is_dir() or list(prepared.iterdir()) == []


@pytest.mark.parametrize("xdg", ["missing", "of-another", "open", "good", "relative"])
def test_runtime_directories(uid: int, xdg: str) -> None:
    """$XDG_RUNTIME_DIR is used when it can be, and /tmp when not; the second time finds the same."""
    parent = Path(f"/tmp/pkernfs-{uid}-xdg")
    if xdg != "missing":
        parent.mkdir(mode=0o700)
        os.chown(parent, uid + (xdg == "of-another"), 0)
        parent.chmod(0o777 if xdg == "open" else 0o700)
    word = str(parent) if xdg != "relative" else f"../../../../../..{parent}"
    first, second = runtime_dirs(uid, word)
    assert first == second == (parent / "pkernfs" if xdg == "good" else Path(f"/tmp/pkernfs-{uid}"))
