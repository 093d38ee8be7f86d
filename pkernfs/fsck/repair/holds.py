"""Repair of held files: what was held stays so."""

from __future__ import annotations

from contextlib import suppress

from pkernfs.errors import PkernfsError
from pkernfs.format import HOLD_NAME, INODE_SIZE, RO_COMPAT_HELD, Ino
from pkernfs.fs.holds import Held, decode, drop, encode, may_be_held, put
from pkernfs.fs.volume import Volume
from pkernfs.fs.xattrs import Xattrs
from pkernfs.fsck.findings import NoFeature, WrongHold
from pkernfs.fsck.repair.work import Work

LOST = "why it was held is lost: fsck.pkernfs has held it again"


def holds(work: Work) -> None:
    """Flag and record are both there, or where nothing can be held neither; one without the other is a hold."""
    volume = work.volume
    for code, data in work.found(WrongHold):
        ino, offset = data.ino, data.ino * INODE_SIZE
        with suppress(PkernfsError):  # no page for the record: it stays as it is
            if may_be_held(volume.inode(ino)):
                volume.enable(RO_COMPAT_HELD)
                held = _record(volume, ino)
                with volume.transaction() as tx:
                    put(tx, volume, ino, held, encode(held))
                work.note(code, f"inode {ino}: is held: {held.reason}", ino=ino, offset=offset)
            else:
                with volume.transaction() as tx:
                    drop(tx, volume, ino)
                work.note(code, f"inode {ino}: is not held any more", ino=ino, offset=offset)
    for code, feature in work.found(NoFeature):
        volume.enable(feature.ro_compat)
        work.note(code, "superblock: the feature of held files was switched on")


def _record(volume: Volume, ino: Ino) -> Held:
    """What the record says, or that it is lost."""
    inode = volume.inode(ino)
    xattrs = Xattrs(volume, ino, inode)
    attribute = xattrs.find(HOLD_NAME) if inode.xattrs else None
    with suppress(ValueError):
        if attribute is not None:
            return decode(xattrs.value(attribute))
    return Held(inode.ctime, LOST)
