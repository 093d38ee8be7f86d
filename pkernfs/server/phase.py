"""Where in its life the keeper of a mount is, and what may come next."""

from __future__ import annotations

import enum
import logging

from pkernfs.errors import PkernfsError

log = logging.getLogger("pkernfs")


class Phase(enum.Enum):
    """Where in its life a keeper is; the value is the sentence for the reader of an error.

    ::

        STARTING --> SERVING <--> UPGRADING --> PROBATION --> SERVING
                        ^             ^
                   TAKING_OVER: from these three and UNMOUNTING, when nobody serves any more

        UNMOUNTING --> ENDING --> ENDED      UNMOUNTING: from any but TAKING_OVER, at a signal; ENDING: the mount is
              |                              in use, or nobody serves; ENDED: also when others have unmounted,
              |                              from TAKING_OVER too
              +-> SERVING                    when it lives on in other mount namespaces
        HANDED_OVER                          at a command, or at SIGTERM from systemd
    """

    STARTING = "has not mounted yet"
    SERVING = "has a worker that serves"
    UPGRADING = "has a worker that serves, and prepares one of another version"
    PROBATION = "has a worker of another version that serves on probation"
    TAKING_OVER = "lets another worker take the place of one that has ended"
    UNMOUNTING = "has a worker that serves until umount is done"
    ENDING = "ends a mount that is in use, or that nobody serves"
    ENDED = "has ended with its mount"
    HANDED_OVER = "has left its mount to another keeper"


#: Phases that may follow.  A takeover goes back to where it came from: its worker is needed in the end as well, since
#: umount waits until what is dirty has been written.
NEXT: dict[Phase, set[Phase]] = {
    Phase.STARTING: {Phase.SERVING, Phase.ENDED},
    Phase.SERVING: {Phase.UPGRADING, Phase.TAKING_OVER, Phase.UNMOUNTING, Phase.ENDED, Phase.HANDED_OVER},
    Phase.UPGRADING: {
        *(Phase.SERVING, Phase.PROBATION),
        *(Phase.TAKING_OVER, Phase.UNMOUNTING, Phase.ENDED, Phase.HANDED_OVER),
    },
    Phase.PROBATION: {Phase.SERVING, Phase.TAKING_OVER, Phase.UNMOUNTING, Phase.ENDED, Phase.HANDED_OVER},
    Phase.TAKING_OVER: {
        *(Phase.SERVING, Phase.UPGRADING, Phase.UNMOUNTING),
        *(Phase.ENDING, Phase.ENDED, Phase.HANDED_OVER),
    },
    Phase.UNMOUNTING: {Phase.SERVING, Phase.TAKING_OVER, Phase.ENDING, Phase.ENDED},
    Phase.ENDING: {Phase.ENDED},
    Phase.ENDED: set(),
    Phase.HANDED_OVER: set(),
}


class PhaseError(PkernfsError):
    """A keeper cannot go on from the phase it is in to the one that is wanted."""

    def __init__(self, what: str, wanted: Phase, found: Phase) -> None:
        super().__init__(
            f"{what}: a keeper that {found.value} ({found.name}) cannot become one that {wanted.value} ({wanted.name})",
            hint="try again later",
        )


class Life:
    """The phase of one keeper, of the mount at ``mountpoint``: the only place where it changes."""

    def __init__(self, mountpoint: str, phase: Phase) -> None:
        self._mountpoint = mountpoint
        self._phase = phase

    @property
    def phase(self) -> Phase:
        """The phase at this moment."""
        return self._phase

    def check(self, phase: Phase, what: str) -> None:
        """Raise PhaseError unless a phase may follow; ``what`` is wanted, for the reader of the error."""
        if phase not in NEXT[self._phase]:
            raise PhaseError(what, phase, self._phase)

    def enter(self, phase: Phase) -> None:
        """Go on to a phase.  Raises PhaseError when it cannot follow, which is a bug of the keeper."""
        self.check(phase, self._mountpoint)
        log.info("keeper of %s: %s -> %s", self._mountpoint, self._phase.name, phase.name)
        self._phase = phase
