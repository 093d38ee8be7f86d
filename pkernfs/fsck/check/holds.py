"""Held files: the flag, the record of why, and the feature of the region go together."""

from __future__ import annotations

from pkernfs.errors import CorruptError
from pkernfs.format import FLAG_HELD, HOLD_NAME, RO_COMPAT_HELD, Ino, Inode
from pkernfs.fs.holds import decode, may_be_held
from pkernfs.fs.xattrs import Xattrs
from pkernfs.fsck.check.state import Check
from pkernfs.fsck.findings import NoFeature, WrongHold
from pkernfs.fsck.problems import Code


def hold(check: Check, ino: Ino, inode: Inode) -> None:
    """A regular file with the flag has a record, no other inode has one or the other."""
    flag = bool(inode.flags & FLAG_HELD)
    if not (flag or inode.xattrs) or not check.findings.tally.sound:  # what is damaged is looked at when it is mended
        return
    try:
        xattrs = Xattrs(check.volume, ino, inode)
        attribute = xattrs.find(HOLD_NAME) if inode.xattrs else None
        if not flag and attribute is None:
            return
        text = f"inode {ino}: expected a hold only of a regular file, found one"
        if may_be_held(inode):
            check.reached.held = True
            text = ""
            if attribute is None:
                text = f"inode {ino}: expected the record of a held file, found none"
            elif not flag:
                text = f"inode {ino}: expected the flag of a held file, found only its record"
            else:
                decode(xattrs.value(attribute))
    except CorruptError:
        return
    except ValueError as error:
        text = f"inode {ino}: expected a time and a reason in the record of a held file, found {error}"
    if text:
        check.note(Code.HOLD, text, data=WrongHold(ino))


def held_feature(check: Check) -> None:
    """A region with held files says so: versions that do not know them may not write to it."""
    if check.reached.held and not check.volume.sb.ro_compat & RO_COMPAT_HELD:
        text = "superblock: expected the feature of held files, as there are some, found it off"
        check.note(Code.HOLD, text, data=NoFeature(RO_COMPAT_HELD))
