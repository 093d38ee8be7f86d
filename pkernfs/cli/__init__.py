"""The commands: one module per verb, each with its parser and its ``run``.

May import everything below, and does so late: a command must not load trio, pyfuse3 or rich before it needs them.
Invariants: errors meet exit codes only here; a PkernfsError is one line on standard error, a bug is a traceback.
"""

import os
import sys
from collections.abc import Callable, Sequence


def guarded(
    run: Callable[[Sequence[str] | None], int], program: str, failure: int | None = None, interrupted: int = 130
) -> int:
    """Run a command and turn what it raises into an exit code.

    ``failure``: the code for every PkernfsError but wrong usage; None: the one that the error's class names.
    """
    from pkernfs.errors import PkernfsError, UsageError

    try:
        code = run(None)
        sys.stdout.flush()
        return code
    except PkernfsError as error:
        from pkernfs.cli.text import printable

        print(f"{program}: {printable(str(error))}", file=sys.stderr)
        return error.exit_code if failure is None or isinstance(error, UsageError) else failure
    except BrokenPipeError:
        # The reader of our output is gone (`pkernfs ls ... | head`); nothing can be told to anybody any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return failure or 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return interrupted


def main() -> int:
    """The command ``pkernfs``."""
    from pkernfs.cli.main import run

    return guarded(run, "pkernfs")


def main_mkfs() -> int:
    """The command ``mkfs.pkernfs``."""
    from pkernfs.cli.mkfs import run

    return guarded(run, "mkfs.pkernfs", failure=1)


def main_fsck() -> int:
    """The command ``fsck.pkernfs``; exit codes of fsck(8)."""
    import signal

    from pkernfs.cli.fsck import main as run

    # fsck(8) hands both on to us, and may itself have been started by a shell with SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    return guarded(lambda _: run(), "fsck.pkernfs", failure=8, interrupted=32)


def main_mount() -> int:
    """The command ``mount.pkernfs``; exit codes of mount(8)."""
    from pkernfs.cli.mount import run

    return guarded(run, "mount.pkernfs", failure=32)
