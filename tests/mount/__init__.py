"""Tests of real mounts: what a user sees, compared with tmpfs or with another program wherever there is one to ask.

``site``   a region, its mountpoint, and what an administrator does with them; checks both when it is closed
``agent``  another process, with the identity of some user, that makes system calls on request
``twin``   the same system calls on the mount and on a tmpfs, compared one by one
``load``   processes that change files until their filesystem is killed, and know which calls had returned
``model``  what those calls make of a tree, in plain Python, and how that compares with what is there
``faulty`` mount.pkernfs with a fault planted in it, which tests must notice
"""
