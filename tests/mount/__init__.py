"""Tests of real mounts: what a user sees, compared with tmpfs or with another program wherever there is one to ask.

``site``   a region, its mountpoint, and what an administrator does with them; checks both when it is closed
``agent``  another process, with the identity of some user, that makes system calls on request
``twin``   the same system calls on the mount and on a tmpfs, compared one by one
"""
