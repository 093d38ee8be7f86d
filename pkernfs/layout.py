"""Records that live in the region: ``NamedTuple`` annotations compiled to one little-endian ``struct.Struct``.

    class Point(NamedTuple):
        x: u32  #: metres
        y: u32  #: metres
    POINT = layout(Point, size=8)
    POINT.unpack(buffer, offset) -> Point;  POINT.pack(point) -> bytes

Every field must stand at a multiple of its own size, and the sum must be the size that was declared: both are checked
at import.
"""

import struct
from collections.abc import Callable
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_args, get_type_hints

u8 = Annotated[int, "B"]
u16 = Annotated[int, "H"]
u32 = Annotated[int, "I"]
u64 = Annotated[int, "Q"]
i32 = Annotated[int, "i"]
i64 = Annotated[int, "q"]
bytes16 = Annotated[bytes, "16s"]
bytes64 = Annotated[bytes, "64s"]
bytes120 = Annotated[bytes, "120s"]

R = TypeVar("R", bound=NamedTuple)


class Layout(Generic[R]):
    """The codec of one record class; ``size`` in bytes."""

    def __init__(self, record: type[R], size: int) -> None:
        self.record = record
        self.offsets: dict[str, int] = {}
        codes = []
        at = 0
        for name, hint in get_type_hints(record, include_extras=True).items():
            code: str = get_args(hint)[1]
            width = struct.calcsize("<" + code)
            if not code.endswith("s") and at % width:
                raise TypeError(f"{record.__name__}.{name} stands at {at}, not at a multiple of {width}")
            self.offsets[name] = at
            codes.append(code)
            at += width
        if at != size:
            raise TypeError(f"{record.__name__} is {at} bytes, declared {size}")
        self.size = size
        self._struct = struct.Struct("<" + "".join(codes))
        self._unpack = self._struct.unpack_from
        self.pack_values = self._struct.pack  #: as ``pack``, of the values in their order: for what must be fast
        self._make: Callable[[Any], R] = record._make

    def unpack(self, buffer: bytes | bytearray | memoryview, offset: int = 0) -> R:
        """Decode the record that begins at ``offset``.  Raises struct.error when the buffer is too short."""
        return self._make(self._unpack(buffer, offset))

    def pack(self, record: R) -> bytes:
        """Encode.  Raises struct.error when a value does not fit its field."""
        return self.pack_values(*record)


def layout(record: type[R], size: int) -> Layout[R]:
    """Compile the annotations of ``record``; ``size`` is what they must add up to."""
    return Layout(record, size)
