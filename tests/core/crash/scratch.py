"""A region whose stores can be taken back, so that each crash costs what it changes and not a copy of the region."""

import functools
import random
from collections.abc import Iterator
from typing import NamedTuple

from pkernfs.format import BLOCK, PAGE
from pkernfs.region import MemoryRegion, RecordingRegion, Store, read_superblock

MANY_WORDS = 512  #: of a store with more, runs of words are torn off and not single ones
RUNS = 16


class Mark(NamedTuple):
    """A moment of a Scratch."""

    stores: int
    keys: tuple[int, int]
    hashes: dict[int, int]


class Scratch(RecordingRegion):
    """A recording region that takes its stores back."""

    def __init__(self, image: bytes) -> None:
        super().__init__(image=image)
        self.undo: list[tuple[int, bytes]] = []
        sb = read_superblock(self)
        self.journal = range(sb.journal_offset // PAGE + 1, sb.first_block * BLOCK // PAGE)
        self._image = image
        self._dirty: set[int] = set()
        self._hashes: dict[int, int] = {}
        self._keys = [0, 0]  #: of the journal, of all else
        self._beginning = self.mark()

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        if data:
            self._note(offset, len(data))
            super().store(offset, data)

    def store_word(self, offset: int, value: int) -> None:
        self._note(offset, 8)
        super().store_word(offset, value)

    def discard(self, offset: int, length: int) -> None:
        self.store(offset, bytes(length))

    def _note(self, offset: int, length: int) -> None:
        self.undo.append((offset, bytes(self.view[offset : offset + length])))
        self._dirty.update(range(offset // PAGE, (offset + length - 1) // PAGE + 1))

    def apply(self, stores: list[Store]) -> None:
        """Make these stores."""
        for one in stores:
            self.store(one.offset, one.data)

    def mark(self) -> Mark:
        """Where ``take_back`` is to come back to."""
        return Mark(len(self.undo), self.keys(), self._hashes.copy())

    def take_back(self, mark: Mark) -> None:
        """Undo all stores since ``mark``, and clear the log."""
        for offset, old in reversed(self.undo[mark.stores :]):
            self.view[offset : offset + len(old)] = old
        del self.undo[mark.stores :]
        self.log.clear()
        self._dirty.clear()
        self._keys[:] = mark.keys
        self._hashes = mark.hashes.copy()

    def reset(self, *, volatile: bool) -> None:
        """Back to the image; from now on it stands for memory, or for a file on a disk."""
        self.take_back(self._beginning)
        self.volatile = self.barriers = volatile

    def keys(self) -> tuple[int, int]:
        """Hashes of what the region holds: of the journal (its header and body), and of all else."""
        for page in self._dirty:
            at = page * PAGE
            old = self._hashes.get(page)
            if old is None:
                old = hash((page, self._image[at : at + PAGE]))
            new = self._hashes[page] = hash((page, bytes(self.view[at : at + PAGE])))
            self._keys[page not in self.journal] ^= old ^ new
        self._dirty.clear()
        return self._keys[0], self._keys[1]


class Twin(MemoryRegion):
    """A copy to look at and to use up; taken from one buffer again and again, as fresh memory is what costs most."""

    def discard(self, offset: int, length: int) -> None:
        self.zero(offset, length)


@functools.lru_cache(maxsize=2)
def scratch_of(image: bytes) -> Scratch:
    """The one Scratch of an image: to be reset before use."""
    return Scratch(image)


@functools.cache
def _twin(size: int) -> Twin:
    return Twin(size)


def copy_of(view: bytes | memoryview) -> Twin:
    """A copy that is valid until the next one of this size is made."""
    twin = _twin(len(view))
    twin.view[:] = view
    return twin


def some_words(store: Store, rng: random.Random) -> list[Store]:
    """Some of the aligned words of a store, any of them; a store of one word is there or not."""
    edges = _edges(store)
    if len(edges) > MANY_WORDS:
        edges = [edges[0], *sorted(rng.sample(edges[1:-1], RUNS)), edges[-1]]
    bits = rng.getrandbits(len(edges))
    chosen = [(edges[n], edges[n + 1]) for n in range(len(edges) - 1) if bits >> n & 1]
    return [Store(store.offset + low, store.data[low:high], True) for low, high in chosen]


def all_but_a_word(store: Store, rng: random.Random) -> list[Store]:
    """A store without one of its words."""
    edges = _edges(store)
    n = rng.randrange(len(edges) - 1)
    low, high = edges[n], edges[n + 1]
    return [Store(store.offset, store.data[:low], True), Store(store.offset + high, store.data[high:], True)]


def _edges(store: Store) -> list[int]:
    """Where the words of a store begin and end."""
    return [0, *range(-store.offset % 8 or 8, len(store.data), 8), len(store.data)]


def torn(store: Store, ways: int, rng: random.Random) -> Iterator[list[Store]]:
    """Ways in which a store can be torn, as the pieces that are there: its first half, its last half, any words."""
    edges = _edges(store)
    if store.word or len(edges) == 2:
        return
    middle = edges[len(edges) // 2]
    halves = [
        Store(store.offset, store.data[:middle], True),
        Store(store.offset + middle, store.data[middle:], True),
    ]
    for way in range(ways):
        yield [halves[way]] if way < 2 else some_words(store, rng)
