"""QEMU guests whose RAM lies in a pkernfs region: command lines, saving, resuming.

What lives here

    errors    QemuError: what was expected, what was found, what to do next
    cmdline   finding QEMU and what it can do; `-object memory-backend-file,...`; a command line for a Linux guest
    monitor   the QMP verbs stop, save, resume, quit on a running QEMU, as plain synchronous calls
    console   reading the guest's serial port: the guest of mount_helpers/guest-kernel counts there
    keep      holding the files of a saved guest, so that nobody removes them
    guest     one guest through its life: start, save, quit, resume, in one directory of its own

May import `pkernfs.client`, `pkernfs.errors` and the standard library.  The PyPI package `qemu.qmp`, the only user of
asyncio, is imported inside the functions that talk, since it costs more time than most commands take.  Nothing here
mounts, or knows how the region is laid out: RAM is "this file" or "this range of this file".

Invariants

- A save copies no shared RAM (x-ignore-shared): the state file holds device state only, and is worth nothing without
  the RAM that lies in the region.
- When `save` has returned, everything that a resume needs has been stored by completed calls: the RAM file and the
  state file are synced.  The mount may be killed then.
- From `quit` to `resume` the RAM file and the state file are held (`pkernfs hold`), where root runs this.
- A save that fails lets the guest go on.
- Every wait is bounded, and a QEMU that dies while it is waited for is reported with what it had to say.
"""
