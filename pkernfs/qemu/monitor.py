"""The QMP verbs that live update needs, as plain synchronous calls.

Each call is one conversation over QEMU's unix socket: connect, negotiate, ask, disconnect (some milliseconds; QEMU
takes the next connection at once).  So a Monitor holds nothing, survives any number of QEMUs behind its socket, and
works from a script or a test without an event loop.  It cannot be used from inside a running one.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pkernfs.qemu.errors import QemuError

if TYPE_CHECKING:
    from qemu.qmp import QMPClient

T = TypeVar("T")
Talk = Callable[["QMPClient"], Awaitable[T]]

#: QEMU reads and writes RAM where it is (x-ignore-shared), and may end and start again in between (cpr-reboot).
CAPABILITIES = [{"capability": "x-ignore-shared", "state": True}]
PARAMETERS = {"mode": "cpr-reboot"}

#: Seconds between two looks at something that has no event to wait for.
POLL = 0.005
#: Seconds that undoing a failed save may take on top of a call's time.
ROLLBACK = 5.0


class Monitor:
    """The QMP socket of a QEMU, by path.

    `timeout` bounds each call in seconds, connecting included.  `check` is called while a socket is waited for; it may
    raise when it knows that nobody will ever open it.
    """

    def __init__(self, path: Path, timeout: float = 60.0, check: Callable[[], None] = lambda: None) -> None:
        self.path = path
        self.timeout = timeout
        self._check = check

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """Run any one QMP command and return its answer."""
        return self._converse(lambda client: _execute(client, command, arguments))

    def status(self) -> str:
        """The run state: `running`, `paused`, `inmigrate`, `postmigrate` ..."""
        return self._converse(_status)

    def stop(self) -> None:
        """Stop the guest's processors.  Nothing happens if they are stopped."""
        self._converse(lambda client: _execute(client, "stop"))

    def cont(self) -> None:
        """Let the guest's processors run."""
        self._converse(lambda client: _execute(client, "cont"))

    def save(self, state: Path) -> None:
        """Stop the guest and write the state of its devices to the file `state`; its shared RAM stays where it is.

        The guest is stopped for good: QEMU should be quit then.  If saving fails, a guest that was running runs again,
        and QemuError tells why.
        """
        self._converse(lambda client: _save(client, state))

    def resume(self, state: Path) -> None:
        """Load `state` into a QEMU that was started with `-incoming defer` on the same RAM, and let the guest run."""
        self._converse(lambda client: _resume(client, state))

    def quit(self) -> None:
        """Ask QEMU to end.  Returns when it has agreed, which is before the process is gone."""
        self._converse(_quit)

    def _converse(self, talk: Talk[T]) -> T:
        return asyncio.run(self._conversation(talk))

    async def _conversation(self, talk: Talk[T]) -> T:
        from qemu.qmp import QMPClient, QMPError

        client = QMPClient("pkernfs")
        client.logger.disabled = True  # it would log what is raised here as well
        doing = "to answer on its QMP socket"
        try:
            async with asyncio.timeout(self.timeout):
                connection = await self._connect()
                await client.connect(connection)
                doing = "to go on"
                return await talk(client)
        except TimeoutError:
            found = f"nothing after {self.timeout:g} s"
            raise QemuError(f"QEMU at {self.path} {doing}", found, "look at its error output and its console") from None
        except (QMPError, EOFError, OSError) as error:
            found = f"{type(error).__name__}: {error}"
            raise QemuError(f"QEMU at {self.path} {doing}", found, "see whether it still runs") from error
        finally:
            # A QEMU that has hung up (quit, crash) makes this raise; whoever asked has been told above.
            with contextlib.suppress(QMPError, EOFError, OSError):
                await client.disconnect()

    async def _connect(self) -> socket.socket:
        """A connection, as soon as QEMU listens.  The caller bounds the time.

        Not left to QMPClient.connect, which logs each failed attempt as an error.
        """
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(os.fspath(self.path))
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                self._check()
                await asyncio.sleep(POLL)
            except BaseException:
                connection.close()
                raise
            else:
                connection.setblocking(False)
                return connection


async def _execute(client: "QMPClient", command: str, arguments: Mapping[str, object] | None = None) -> object:
    from qemu.qmp import ExecuteError

    try:
        return await client.execute(command, None if arguments is None else dict(arguments))
    except ExecuteError as error:
        hint = "check the files named, and that QEMU is as it was when it saved"
        raise QemuError(f"QEMU to accept {command} {dict(arguments or {})}", str(error), hint) from error


async def _query(client: "QMPClient", command: str) -> Mapping[str, object]:
    answer = await _execute(client, command)
    assert isinstance(answer, dict)
    return answer


async def _status(client: "QMPClient") -> str:
    return str((await _query(client, "query-status"))["status"])


async def _prepare(client: "QMPClient") -> None:
    """What both sides of a migration have to agree on."""
    await _execute(client, "migrate-set-capabilities", {"capabilities": CAPABILITIES})
    await _execute(client, "migrate-set-parameters", PARAMETERS)


async def _migrated(client: "QMPClient", verb: str) -> None:
    """Wait until the migration that was begun is complete.

    By looking, not by event: this also sees what ended before we listened, and an error of the connection ends it.
    """
    while True:
        found = await _query(client, "query-migrate")
        match found.get("status"):
            case "completed":
                return
            case "failed" | "cancelled" as status:
                reason = str(found.get("error-desc", status))
                raise QemuError(f"QEMU to {verb}", reason, "see QEMU's error output")
        await asyncio.sleep(POLL)


async def _save(client: "QMPClient", state: Path) -> None:
    was = await _status(client)
    try:
        await _prepare(client)
        await _execute(client, "stop")
        await _execute(client, "migrate", {"uri": f"file:{state}"})
        await _migrated(client, f"save its state to {state}")
    except BaseException:
        # Also when our time is up.  A QEMU that does not answer gets little more; the first error is the one to tell.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(ROLLBACK):
                await _execute(client, "migrate_cancel")
                if was == "running":
                    await _execute(client, "cont")
        raise


async def _resume(client: "QMPClient", state: Path) -> None:
    await _prepare(client)
    await _execute(client, "migrate-incoming", {"uri": f"file:{state}"})
    await _migrated(client, f"load its state from {state}")
    await _execute(client, "cont")


async def _quit(client: "QMPClient") -> None:
    await _execute(client, "quit")
