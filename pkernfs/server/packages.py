"""trio and pyfuse3, imported without what they import and we never use: to be imported first in a worker."""

from pkernfs.lean import lean_imports

with lean_imports():
    import pyfuse3
    import trio

__all__ = ["pyfuse3", "trio"]
