"""A worker that fails when it is told to: faulty_worker.py FILE FD.

FILE holds the name of a handler and what is to happen when it is called: one of ACTIONS.  It is removed before that
happens, unless "!" stands behind the action.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from pkernfs.server import worker
from pkernfs.server.operations import Operations

HANDLERS = [
    *("lookup", "getattr", "setattr", "mknod", "mkdir", "symlink", "create", "readlink", "link", "unlink", "rmdir"),
    *("rename", "opendir", "readdir", "open", "read", "write", "fsync", "getxattr", "setxattr", "listxattr"),
    *("removexattr", "statfs"),
]
#: kill: after the operation is done, before it is answered
#: die: before anything is done
#: block: nothing runs any more
#: wait: this request is never answered
#: bug: the operation is a bug
ACTIONS = ("kill", "die", "block", "wait", "bug")


def struck(name: str, file: Path) -> str:
    """What is to happen to this handler."""
    try:
        wanted, action = file.read_text().split()
    except FileNotFoundError:
        return ""
    if wanted != name:
        return ""
    if not action.endswith("!"):
        file.unlink()
    action = action.rstrip("!")
    assert action in ACTIONS
    return action


def wrap(name: str, file: Path) -> Callable[..., Any]:
    handler = getattr(Operations, name)

    async def call(self: Operations, *args: Any, **kwargs: Any) -> Any:
        match struck(name, file):
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "block":
                time.sleep(1000)  # noqa: ASYNC251  # the whole worker is to hang
            case "wait":
                self.requests.begun += 1
                with self.requests.waiting():
                    await trio.sleep_forever()
            case "bug":
                self.fs = None  # type: ignore[assignment]
            case "kill":
                try:
                    await handler(self, *args, **kwargs)
                finally:
                    os.kill(os.getpid(), signal.SIGKILL)
        return await handler(self, *args, **kwargs)

    return call


if __name__ == "__main__":
    for handler_name in HANDLERS:
        setattr(Operations, handler_name, wrap(handler_name, Path(sys.argv[1])))
    sys.argv = [sys.argv[0], sys.argv[2]]
    worker.main()
