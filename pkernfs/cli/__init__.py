"""The commands: one module per verb, each with its parser and its ``run``.

May import everything below, and does so late: a command must not load trio, pyfuse3 or rich before it needs them.
Invariants: errors meet exit codes only here; a PkernfsError is one line on standard error, a bug is a traceback.
"""

import io
import os
import sys
from collections.abc import Callable, Sequence

from pkernfs.surroundings import open_standard_descriptors


class _Output(io.FileIO):
    """Standard output, whose errors are no bug: a full disk, a file that became too large."""

    def write(self, data: object) -> int | None:  # type: ignore[override]
        """Write.  Raises OutputError, BrokenPipeError."""
        try:
            return super().write(data)  # type: ignore[arg-type]
        except BrokenPipeError:
            raise
        except OSError as error:
            from pkernfs.errors import OutputError

            raise OutputError(f"cannot write the output: {error.strerror}") from None


def _prepare_output() -> None:
    """Let standard input, output and error be there, and names that are no UTF-8 be printed as they are."""
    open_standard_descriptors()
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", write_through=True)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), "utf-8", "surrogateescape")
    if sys.stdout is None or getattr(sys.stdout, "name", "") == "<stdout>":
        raw = _Output(1, "w", closefd=False)
        encoding = sys.stdout.encoding if sys.stdout is not None else "utf-8"
        # Strict in most locales, where such a name would end the command.
        errors = "surrogateescape" if encoding == sys.getfilesystemencoding() else "backslashreplace"
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=raw.isatty())


def _drop_output() -> None:
    """What was not written is not tried again at the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def guarded(
    run: Callable[[Sequence[str] | None], int], program: str, failure: int | None = None, interrupted: int = 130
) -> int:
    """Run a command and turn what it raises into an exit code.

    ``failure``: the code for every PkernfsError but wrong usage; None: the one that the error's class names.
    """
    _prepare_output()
    from pkernfs.errors import OutputError, PkernfsError, UsageError

    try:
        try:
            code = run(None)
        except SystemExit as error:  # argparse has printed something
            code = error.code if isinstance(error.code, int) else 1
        sys.stdout.flush()
        return code
    except PkernfsError as error:
        from pkernfs.errors import printable

        if isinstance(error, OutputError):
            _drop_output()
        print(f"{program}: {printable(str(error))}", file=sys.stderr)
        return error.exit_code if failure is None or isinstance(error, UsageError) else failure
    except BrokenPipeError:
        # The reader of our output is gone (`pkernfs ls ... | head`); nothing can be told to anybody any more.
        _drop_output()
        return failure or 1
    except FileNotFoundError:
        try:
            os.getcwd()
        except FileNotFoundError:
            print(f"{program}: the working directory was removed: cd to another one", file=sys.stderr)
            return failure or 1
        raise
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
