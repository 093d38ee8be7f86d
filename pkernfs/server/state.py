"""What a keeper knows and holds: what the next keeper of the same mount needs."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from pkernfs.options import MountOptions
from pkernfs.server.messages import StateFacts
from pkernfs.server.resources import Trouble

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pkernfs import api
    from pkernfs.mountinfo import Mount
    from pkernfs.processes import Holder


class Descriptors(NamedTuple):
    """What is open as long as the mount lives."""

    region: int  #: holds the region's lock
    references: int  #: memory with the kernel's references to inodes
    stats: int  #: memory with counters
    control: int  #: listens for verbs that the worker answers
    commands: int  #: listens for verbs that the keeper answers
    device: int  #: /dev/fuse


#: Names of the Descriptors in systemd's store.  "orders": so that a keeper finds those of one before version 0.2.0,
#: whose mount it would end otherwise.
FD_NAMES = ("region", "references", "stats", "control", "orders", "device")
#: All names in systemd's store: the state in a file and the socket to the worker too.
STORED = ("state", "worker", *FD_NAMES)


@dataclass
class State:
    """One mount and what happened to it.  Times in seconds since the epoch, lengths of time in seconds."""

    region: str
    mountpoint: str
    options: MountOptions
    command: list[str]  #: the program of a worker
    device: str = ""  #: MAJOR:MINOR of the mount
    init: bytes = b""  #: the kernel's INIT
    control_path: str = ""
    commands_path: str = ""  #: "orders_path" in JSON, as keepers before version 0.2.0 give and take it
    worker: int = 0  #: process id
    worker_since: float = 0.0
    version: str = ""  #: of the worker
    since: float = field(default_factory=time.time)
    keepers: int = 1  #: so far
    takeovers: int = 0
    last_reason: str = ""  #: how the worker before ended
    last_takeover: float = 0.0
    longest_stall: float = 0.0

    def to_json(self) -> StateFacts:
        """As JSON can hold it: keepers and workers of other versions read it too, see "orders_path"."""
        facts: StateFacts = dataclasses.asdict(self) | {"options": self.options._asdict(), "init": self.init.hex()}
        facts["orders_path"] = facts.pop("commands_path")
        return facts

    @classmethod
    def from_json(cls, facts: Any) -> Self:
        """Undo to_json."""
        options = MountOptions(**facts["options"] | {"kernel": tuple(facts["options"]["kernel"])})
        facts = facts | {"options": options, "init": bytes.fromhex(facts["init"])}
        facts["commands_path"] = facts.pop("orders_path")
        return cls(**facts)

    def _place(self, mountpoints: list[str]) -> str:
        """Where it is mounted: on the directory of the beginning, or where it was moved since."""
        return self.mountpoint if self.mountpoint in mountpoints or not mountpoints else mountpoints[0]

    def status(
        self,
        *,
        mounts: Sequence[Mount],
        elsewhere: Sequence[Holder],
        standby: int,
        requests: dict[str, int],
        failed_requests: int,
        dirty: int | None,
        awaiting: int,
        pinned: int | None,
        troubles: Iterable[Trouble],
        memory: int | None,
        host_free: int | None,
        refused: str,
    ) -> api.Status:
        """What `pkernfs status` shows: of the state, and what the keeper adds."""
        from pkernfs import api

        now = time.time()
        return api.Status(
            mountpoint=self._place([mount.mountpoint for mount in mounts if mount.root == "/"]),
            mountpoints=[mount.mountpoint for mount in mounts],
            elsewhere=[str(holder) for holder in elsewhere],
            region=self.region,
            device=self.device,
            readonly=self.options.readonly,
            keeper=os.getpid(),
            keepers=self.keepers,
            worker=self.worker,
            version=self.version,
            uptime=now - self.since,
            worker_uptime=now - self.worker_since if self.worker else 0.0,
            takeovers=self.takeovers,
            last_reason=self.last_reason,
            last_takeover=self.last_takeover,
            longest_stall=self.longest_stall,
            standby=standby,
            requests=requests,
            failed_requests=failed_requests,
            dirty=dirty,
            pinned=pinned,
            awaiting=awaiting,
            troubles=[api.Trouble(*one) for one in troubles],
            memory=memory,
            host_free=host_free,
            refused=refused,
        )
