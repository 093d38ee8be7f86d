"""The server of a mount: a keeper that holds it, workers that serve it, and their two control sockets.

The keeper: start (of a mount), mountpoint, keeper (the loop), phase (what may follow what), serving (the connection and
its worker), standby, upgrade, succession (from keeper to keeper), systemd, signals, commands (its socket), exporter;
device and relay speak the kernel's messages for it, child and heartbeat are a worker as it sees one.  It loads neither
trio nor pyfuse3 nor a filesystem, and never looks into the region.

A worker: worker (the process), loop, operations (FUSE's requests to fs, and only that), requests, replay, space,
attributes, xattrs, handles, housekeeping, buffers; control and verbs (its socket).  The only trio and pyfuse3 code,
0.3 s to import.

May import: fsck and all below.  Invariants: handlers do not await (but for memory to be reclaimed, when the space has
run out and nothing was changed), so a request is executed from its delivery to its reply without another one in
between; only this room raises FUSEError; nothing is kept here that could not be rebuilt from the region, but the
kernel's look-up counts.
"""
