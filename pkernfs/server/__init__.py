"""The server: FUSE adapter, mounting, control socket.  The only trio and pyfuse3 code, imported late (0.3 s).

May import: fs, region, format, layout, errors.  Invariants: handlers do not await (but for removed files to be
forgotten, when the space has run out and nothing was changed), so a request is executed from its delivery to its reply
without another one in between; only this room raises FUSEError; nothing is kept here that could not be rebuilt from the
region, but the kernel's look-up counts.
"""
