"""The proof that no crash hurts a region.

A crash (of the server, the mount, the kernel) leaves any prefix of the stores, the last one torn: of its aligned 8-byte
words any may be there and any not.  A power cut leaves of what was not flushed any subset of the words (media mode:
regions on a disk).

    states      what a region holds when an operation begins
    operations  what is done to it; the table of both
    scratch     a region whose stores can be taken back, and the pieces that stores are torn into
    look        everything that a user can see of a region, and whether it still works
    proof       run, cut, recover, judge

Free memory of the starting states is full of old bytes, and so is what lies behind the ends of files.
"""
