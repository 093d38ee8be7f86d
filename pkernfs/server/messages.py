"""What a keeper and its workers tell each other: each message is one JSON object, with descriptors.

    up        from the worker, when it has imported everything
    fork      with the other's socket: become two, of which one serves the other socket    forked
    check     with the region: can this version read it?                                    {"checked": true}
    open      with the region, the references, the counters                                 opened
    serve     with /dev/fuse, the socket that stands in for it, and the listening sockets
    ready     from the first worker, after the first request: the mount is usable
    know      the state as it is now
    beat      how are you?                                                                  pulse
    drain     let another worker serve
    end       let go of the mount

A worker that cannot do what it was told answers with a failure.

Both ends are of this project and start together, so that nothing here is checked as it is in api.py, and nothing heavy
is loaded: a worker says that it is up before it loads what answers the verbs.  Where a version changes the meaning of a
message, PROTOCOL (child.py) counts up.
"""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

#: What state.py makes of a State; older and newer keepers read it, too.
StateFacts = dict[str, object]


class Up(TypedDict):
    """What a worker says of itself."""

    pid: int
    version: str
    protocol: int
    stacks: int  #: a descriptor of its own, to which it writes its stacks when asked for them
    forks: NotRequired[bool]  #: it knows the message; not before 0.3.0


class Instruction(TypedDict):
    """What a worker is told."""

    verb: Literal["fork", "check", "open", "serve", "know", "beat", "drain", "end"]
    prints: NotRequired[bool]  #: with fork: where the other can print, which nobody of the two can else
    state: NotRequired[StateFacts]  #: with check, open, serve, know
    first: NotRequired[bool]  #: with open: nobody has served the mount before
    revive: NotRequired[bool]  #: with serve: start another keeper when this one is gone


class Forked(TypedDict):
    """The answer to fork."""

    forked: int  #: process id


class Checked(TypedDict):
    """The answer to check."""

    checked: Literal[True]  #: what it cannot read is a failure


class Opened(TypedDict):
    """The answer to open."""

    opened: int  #: records of the journal that were replayed


class Ready(TypedDict):
    """The mount is usable."""

    ready: int  #: process id
    warning: str  #: or ""


class Pulse(TypedDict):
    """The answer to a beat."""

    oldest: float  #: seconds that the oldest request has been at work
    begun: int  #: requests that were read so far


class Failure(TypedDict):
    """What was told could not be done."""

    error: str
    exit_code: int
    errno: NotRequired[int]  #: not from 0.1
