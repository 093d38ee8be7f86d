"""How requests and replies go through a socket: one JSON object a line each way, and errors with their errno.

Both servers and every client use these functions, so that there is one framing, one limit and one way for an error.

JSON is read and written by the standard library, and only checked by msgspec: names of files can be any bytes, which
are lone surrogates in a string, and msgspec's own JSON knows none.
"""

from __future__ import annotations

import errno
import json
import logging
from typing import Any, Final, TypeVar

import msgspec

from pkernfs.api import API_VERSION, VERBS, Refusal, Request, Server, of_first_release
from pkernfs.errors import FsError, PkernfsError

log = logging.getLogger("pkernfs")

#: Bytes of a request.  The longest has two paths (PATH_MAX is 4096); a program that sends no end is not to fill memory.
LINE_MAX: Final = 1 << 16
R = TypeVar("R")


class RefusedError(PkernfsError):
    """An error that came, or goes, through a socket.

    ``known``: what is known, if another verb, field or version was found.
    """

    def __init__(self, number: int, text: str, *, hint: str = "", known: list[str] | None = None) -> None:
        super().__init__(text, hint=hint)
        self.errno = number
        self.known = known or []


class Lines:
    """The lines of what comes in pieces."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._buffer += data

    def next(self) -> bytes | None:
        """The next line; None: its end has not come yet.  Raises FsError(E2BIG) when it is too long to come."""
        end = self._buffer.find(b"\n")
        if end < 0:
            if len(self._buffer) > LINE_MAX:
                raise FsError(errno.E2BIG, f"a request of more than {LINE_MAX} bytes")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line


# -- requests -------------------------------------------------------------------------------------------------------


def encode_request(request: Request[Any]) -> bytes:
    """The line of a request."""
    return json.dumps(msgspec.to_builtins(request)).encode() + b"\n"


def decode_request(line: bytes, server: Server) -> Request[Any]:
    """The request of a line, which must be one that ``server`` answers.  Raises RefusedError."""
    try:
        fields = json.loads(line)
        word = fields["verb"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise RefusedError(errno.EINVAL, 'expected a JSON object with "verb"') from None
    number = fields.get("version", API_VERSION)
    if number != API_VERSION:
        known = [str(API_VERSION)]
        raise _unknown(errno.EPROTONOSUPPORT, f"no version {json.dumps(number)} of the protocol", known)
    fields = of_first_release(fields)
    verb = VERBS.get(fields["verb"]) if isinstance(word, str) else None
    if verb is None or verb.server != server:
        known = [name for name, one in VERBS.items() if one.server == server]
        raise _unknown(errno.EOPNOTSUPP, f"no verb {json.dumps(word)}", known)
    known = verb.fields
    strange = next((name for name in fields if name not in known), None)
    if strange is not None:
        raise _unknown(errno.EINVAL, f"{verb.name}: no field {json.dumps(strange)}", known)
    try:
        request: Request[Any] = msgspec.convert(fields, verb.request)
    except msgspec.ValidationError as error:
        # "Expected `int`, got `str` - at `$.ino`"
        what, _, where = str(error).replace("`", "").partition(" - at $.")
        text = f'{verb.name}: "{where}": {what}' if where else f"{verb.name}: {what}"
        raise RefusedError(errno.EINVAL, text) from None
    except UnicodeEncodeError:  # what msgspec says of half a character where there should be something else than text
        raise RefusedError(errno.EINVAL, f"{verb.name}: found half a character in a field that is no name") from None
    return request


def _unknown(number: int, text: str, known: list[str]) -> RefusedError:
    return RefusedError(number, text, hint=f"known are {', '.join(known)}", known=known)


# -- replies --------------------------------------------------------------------------------------------------------


def encode_result(result: object) -> bytes:
    """The line for what was done."""
    return json.dumps({"result": msgspec.to_builtins(result)}).encode() + b"\n"


def encode_error(error: Exception, request: Request[Any] | None = None) -> bytes:
    """The line for what was not done; an error that is no user's is a bug, and goes to the log."""
    if not isinstance(error, PkernfsError):
        log.error("a bug: control request %s failed", request, exc_info=error)
        error = FsError(errno.EIO, f"a bug in the server, see its log ({type(error).__name__}: {error})")
    refusal = Refusal(error.text, error.errno, error.hint, getattr(error, "known", []))
    return json.dumps(msgspec.to_builtins(refusal)).encode() + b"\n"


def decode_reply(line: bytes, request: Request[R]) -> R:
    """The result of a request.  Raises RefusedError."""
    verb = VERBS[str(request.__struct_config__.tag)]
    try:
        reply = json.loads(line)
        if "error" in reply:
            refusal = msgspec.convert(reply, Refusal)
            raise RefusedError(refusal.errno, refusal.error, hint=refusal.hint, known=refusal.known)
        result: R = msgspec.convert(reply["result"], verb.reply)
    except (ValueError, TypeError, KeyError, msgspec.ValidationError) as error:
        text = f"{verb.name}: the server's reply is not what this version understands ({error})"
        raise RefusedError(errno.EPROTO, text, hint="pkernfs upgrade lets this version serve") from None
    return result
