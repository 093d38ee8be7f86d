"""A private view of memory that knows shared mappings only, as device DAX does: stores go to copies laid over it.

mmap(2) with MAP_FIXED and mremap(2) to an address, which Python's mmap module does not have.
"""

import ctypes
import mmap
import os
import weakref

PROT_NONE = 0
MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000  # mmap(2)
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2  # mremap(2)
MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _checked(result: int | None) -> int:
    """What a call of libc has returned.  Raises OSError."""
    if result is None or result in (MAP_FAILED, -1):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _mmap(address: int | None, length: int, protection: int, flags: int, fd: int = -1) -> int:
    return _checked(_libc.mmap(address, length, protection, flags, fd, 0))


class Overlay:
    """The first ``size`` bytes of a file or device, mapped for reading, and copies of the pieces that are stored to.

    Whoever stores into ``view`` calls ``cover`` first: where that was not done a store is SIGSEGV.  A piece has
    ``piece`` bytes, the device's alignment: it splits its mappings nowhere else (drivers/dax/device.c,
    dev_dax_may_split).  The mapping lasts as long as any view of it.  Raises OSError.
    """

    def __init__(self, fd: int, size: int, piece: int) -> None:
        self.piece = piece
        # No memory is asked for: of private memory only what can be written counts against the limit of overcommitting.
        length = size + piece
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        reserved = _mmap(None, length, PROT_NONE, flags | MAP_NORESERVE)
        self.address = -(-reserved // piece) * piece
        memory = (ctypes.c_char * size).from_address(self.address)
        weakref.finalize(memory, _libc.munmap, reserved, length).atexit = False
        _mmap(self.address, size, mmap.PROT_READ, mmap.MAP_SHARED | MAP_FIXED, fd)
        self.view = memoryview(memory).cast("B")
        self.covered = bytearray(size // piece)

    def cover(self, offset: int, length: int) -> None:
        """Lay copies over the pieces of a range: stores into it are seen in ``view`` only.  Raises OSError."""
        for index in range(offset // self.piece, -(-(offset + length) // self.piece)):
            if not self.covered[index]:
                self._cover(self.address + index * self.piece)
                self.covered[index] = 1

    def _cover(self, address: int) -> None:
        """In one step: who reads meanwhile finds the same bytes at every moment."""
        piece = self.piece
        copy = _mmap(None, piece, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            ctypes.memmove(copy, address, piece)
            _checked(_libc.mremap(copy, piece, piece, MREMAP_MAYMOVE | MREMAP_FIXED, address))
        except OSError:
            _libc.munmap(copy, piece)
            raise

    def madvise(self, option: int, start: int, length: int) -> None:
        """Advise the kernel on a range, as mmap's."""
        _checked(_libc.madvise(self.address + start, length, option))

    def flush(self) -> None:
        """Nothing: what is stored is in the copies only."""

    def close(self) -> None:
        """Let go of the mapping."""
        self.view.release()
