"""Measurements of the mount beside its peers: plain tmpfs, and bindfs over tmpfs, a FUSE filesystem in C.

`tests/run --bench` runs them all, prints one Markdown table, and judges nothing.  Figures of two runs compare poorly,
those of one run well: every round takes each measurement on all systems one after the other.

    systems      what is measured: mount, unmount
    fio          sequential and random reads and writes of a file
    loops        create, stat, unlink; reads from the page cache; random writes to a mapped file
    mounting     how long it takes to mount
    takeover     how long nobody answers when a worker is killed; a command of its own too
    report       the table and the JSON
"""
