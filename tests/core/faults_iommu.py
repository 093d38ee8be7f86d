"""Faults of page tables, of their records and of the pins of files: the one invariant that each breaks."""

import stat
from collections.abc import Callable
from typing import Any

from pkernfs import format as f
from pkernfs.format import Ino
from pkernfs.fs.filesystem import Filesystem
from pkernfs.iommu.records import Records
from pkernfs.region.superblock import copies_of, encode_superblock
from tests.core.support import attach, map_file, mkdomain, mkfile, patch_inode


def domain(fs: Filesystem) -> Ino:
    """A domain that maps three pages of a file of its own at page 0x100, with records of every kind there are."""
    ino = mkdomain(fs)
    file = mkfile(fs, b"ram", b"R" * 5 * f.PAGE)
    map_file(fs, ino, 0x100, file, 1, 3)
    put(fs, ino, f.DOMAIN_KEY, f.DOMAIN.pack(f.DomainRecord(f.TABLES_VTD, 4, 3, 0, 1, 1, 0)))
    attach(fs, 0x28, ino)
    fs.volume.enable(f.RO_COMPAT_AWAITING)
    was = mkfile(fs, b"was", b"W" * 5 * f.PAGE)
    for key, value in (
        (f.PENDING_CONTEXT_KEY + 0x30, f.PENDING.pack(f.PendingInvalidation(0, 1))),
        (f.PENDING_IOTLB_KEY + (1 << f.IOVA_PAGE_BITS) + 0x100, f.PENDING.pack(f.PendingInvalidation(3, 1))),
        (f.REQUEST_KEY, f.REQUEST.pack(f.Request(5, 6))),
        (awaiting_key(was), AWAITED),
    ):
        put(fs, f.ROOT_PGTABLES_INO, key, value)
    patch_inode(fs, was, iommu=1)
    return ino


def awaiting_key(ino: int, domain_id: int = 1) -> int:
    """Of the record of content of inode ``ino`` that awaits an invalidation."""
    return f.AWAITING_KEY + (ino << f.DOMAIN_ID_BITS) + domain_id


AWAITED = f.AWAITING.pack(f.AwaitingContent(f.FilePage(1), 3))


def bad_awaiting(path: bytes, **fields: Any) -> Callable[[Filesystem], object]:
    """Content of a file awaits an invalidation, which the record says otherwise than it can be."""

    def plant(fs: Filesystem) -> None:
        domain(fs)
        value = f.AWAITING.pack(f.AwaitingContent(f.FilePage(0), 1)._replace(**fields))
        put(fs, f.ROOT_PGTABLES_INO, awaiting_key(fs.resolve(path)), value)

    return plant


def not_pending(fs: Filesystem) -> None:
    """Content awaits an invalidation of a domain id that none is pending of."""
    domain(fs)
    was = fs.resolve(b"was")
    put(fs, f.ROOT_PGTABLES_INO, awaiting_key(was, 2), AWAITED)
    patch_inode(fs, was, iommu=2)


def feature_off(fs: Filesystem) -> None:
    """Content awaits an invalidation, and the superblocks do not say that there may be such."""
    domain(fs)
    raw = encode_superblock(fs.volume.sb._replace(ro_compat=fs.volume.sb.ro_compat & ~f.RO_COMPAT_AWAITING))
    for at in (0, *copies_of(fs.volume.sb)):
        fs.region.store(at, raw[: f.SUPERBLOCK_CHECKED])


def put(fs: Filesystem, ino: Ino, key: int, value: bytes) -> None:
    """Put any record, and leave pins alone."""
    with fs.volume.transaction() as tx:
        records = Records(fs.volume, ino)
        records.put(tx, key, value)
        records.finish(tx)


def put_mapping(fs: Filesystem, key: int = 0x200, **fields: Any) -> None:
    """One more mapping of /ram, with other fields; pinned where it names a file."""
    ino = domain(fs)
    mapping = f.Mapping(fs.resolve(b"ram"), f.FilePage(0), 1, f.READ)._replace(**fields)
    put(fs, ino, key, f.MAPPING.pack(mapping))
    if mapping.ino == fs.resolve(b"ram"):
        patch_inode(fs, mapping.ino, iommu=2)


def bad_record(ino: Ino | None = None, key: int = 0x200, value: bytes = b"") -> Callable[[Filesystem], object]:
    """Put a record that cannot be into page tables; None: into the domain."""

    def plant(fs: Filesystem) -> None:
        made = domain(fs)
        put(fs, made if ino is None else ino, key, value)

    return plant


def bad_domain(**fields: Any) -> Callable[[Filesystem], object]:
    fine = f.DomainRecord(f.TABLES_VTD, 4, 3, 0, 1, 1, 0)
    return bad_record(key=f.DOMAIN_KEY, value=f.DOMAIN.pack(fine._replace(**fields)))


def ram(**fields: Any) -> Callable[[Filesystem], object]:
    """The inode of the file that is mapped, changed."""

    def plant(fs: Filesystem) -> None:
        domain(fs)
        patch_inode(fs, fs.resolve(b"ram"), **fields)

    return plant


def tables(**fields: Any) -> Callable[[Filesystem], object]:
    """The inode of the domain, changed."""
    return lambda fs: patch_inode(fs, domain(fs), **fields)


def orphan_of_mapping(fs: Filesystem) -> None:
    """A file without a name that is mapped, and counts no pins."""
    ino = domain(fs)
    file = mkfile(fs, b"gone", b"G" * f.PAGE)
    map_file(fs, ino, 0x300, file)
    fs.unlink(f.ROOT_INO, b"gone")
    patch_inode(fs, file, iommu=0)


def same_id(fs: Filesystem) -> None:
    domain(fs)
    put(fs, mkdomain(fs, b"dom-1", 0), f.DOMAIN_KEY, f.DOMAIN.pack(f.DomainRecord(f.TABLES_AMD, 3, 1, 0, 1, 0, 0)))


def tables_with_a_hole(fs: Filesystem) -> None:
    """Two blocks, of which the first is not mapped at the start of the file."""
    ino = domain(fs)
    extent = f.EXTENT.unpack(fs.getattr(ino).inline)
    inline = f.EXTENT.pack(extent._replace(start=f.FilePage(f.PAGES_PER_BLOCK)))
    patch_inode(fs, ino, size=2 * f.BLOCK, inline=inline + bytes(f.INLINE_SIZE - len(inline)))
    put(fs, ino, f.DOMAIN_KEY, f.DOMAIN.pack(f.DomainRecord(f.TABLES_VTD, 4, 3, 0, 1, 0, 0)))


def clear_bit(fs: Filesystem) -> None:
    (extent,) = fs.content.extents(domain(fs))
    fs.region.store_word(extent.page * f.PAGE, 0xF0)


def flag(path: bytes, flags: int) -> Callable[[Filesystem], object]:
    return lambda fs: patch_inode(fs, fs.resolve(path), flags=fs.getattr(fs.resolve(path)).flags | flags)


def in_iommu(fs: Filesystem) -> None:
    """A file that is no domain."""
    patch_inode(fs, mkdomain(fs, b"file", 0), flags=f.FLAG_FILE)


def move_domain(fs: Filesystem) -> None:
    """The domain, from iommu/ to the root directory."""
    ino = domain(fs)
    for parent, added in ((f.IOMMU_INO, False), (f.ROOT_INO, True)):
        directory = fs.names.directory(parent)
        with fs.volume.transaction() as tx:
            if added:
                directory.add(tx, b"dom-0", ino, stat.S_IFREG)
            else:
                entry = directory.find(b"dom-0")
                assert entry
                directory.remove(tx, entry)
            tx.put_inode(parent, directory.finish(0))


def node_of_records(fs: Filesystem) -> int:
    """A byte of the node of the domain's records."""
    return fs.getattr(domain(fs)).iommu * f.PAGE + 4


FAULTS: dict[str, tuple[str, Callable[[Filesystem], object]]] = {
    "iommu-file-that-is-no-domain": ("iommu-name", in_iommu),
    "iommu-file-with-the-flag": ("iommu-name", flag(b"g", f.FLAG_IOMMU_DOMAIN_PGTABLES)),
    "iommu-domain-elsewhere": ("iommu-name", move_domain),
    "iommu-directory-with-the-flag": ("inode-flags", flag(b"empty", f.FLAG_IOMMU_DOMAIN_PGTABLES)),
    "iommu-flag-of-the-root": ("inode-flags", flag(b"g", f.FLAG_IOMMU_ROOT_PGTABLES)),
    "iommu-tables-too-large": ("iommu-size", tables(size=2 * f.BLOCK)),
    "iommu-tables-too-small": ("iommu-size", tables(size=f.PAGE)),
    "iommu-tables-with-a-hole": ("iommu-size", tables_with_a_hole),
    "iommu-bitmap": ("iommu-bitmap", clear_bit),
    "iommu-record-of-another-size": ("iommu-record", bad_record(value=b"x" * 24)),
    "iommu-record-with-an-unknown-key": ("iommu-record", bad_record(key=1 << 50, value=b"x" * 32)),
    "iommu-record-in-the-wrong-tree": ("iommu-record", bad_record(f.ROOT_PGTABLES_INO, value=b"x" * 32)),
    "iommu-attachment-in-a-domain": ("iommu-record", bad_record(key=f.ATTACHMENT_KEY, value=bytes(16))),
    "iommu-root-table-beyond-its-file": (
        "iommu-record",
        bad_record(f.ROOT_PGTABLES_INO, f.ROOT_TABLE_KEY, f.ROOT_TABLE.pack(f.RootTable(1 << 40))),
    ),
    "iommu-pending-of-another-id": (
        "iommu-record",
        bad_record(f.ROOT_PGTABLES_INO, f.PENDING_IOTLB_KEY + 7, f.PENDING.pack(f.PendingInvalidation(1, 9))),
    ),
    **{
        f"iommu-domain-{field}": ("iommu-record", bad_domain(**{field: value}))
        for field, value in (("tables", 2), ("levels", 6), ("leaf", 0), ("reserved", 1), ("id", 0), ("root", 1 << 40))
    },
    "iommu-mapping-of-no-pages": ("iommu-record", lambda fs: put_mapping(fs, length=0, ino=1)),
    "iommu-mapping-beyond-all-iovas": ("iommu-record", lambda fs: put_mapping(fs, (1 << 45) - 1, length=2, ino=1)),
    "iommu-mapping-that-wraps": ("iommu-record", lambda fs: put_mapping(fs, start=(1 << 64) - 1, length=2, ino=1)),
    "iommu-mapping-without-rights": ("iommu-record", lambda fs: put_mapping(fs, access=0, ino=1)),
    "iommu-mapping-with-more-rights": ("iommu-record", lambda fs: put_mapping(fs, access=7, ino=1)),
    "iommu-overlap": ("iommu-overlap", lambda fs: put_mapping(fs, 0x102, ino=1)),
    "iommu-same-id": ("iommu-domain-id", same_id),
    "iommu-mapping-of-nothing": ("iommu-mapping", lambda fs: put_mapping(fs, ino=1 << 60)),
    "iommu-mapping-of-a-free-slot": ("iommu-mapping", lambda fs: put_mapping(fs, ino=fs.resolve(b"big") + 15)),
    "iommu-mapping-of-a-directory": ("iommu-mapping", lambda fs: put_mapping(fs, ino=fs.resolve(b"d"))),
    "iommu-mapping-of-tables": ("iommu-mapping", lambda fs: put_mapping(fs, ino=f.ROOT_PGTABLES_INO)),
    "iommu-mapping-of-a-hole": ("iommu-mapping", lambda fs: put_mapping(fs, length=6)),
    "iommu-mapping-far-outside": ("iommu-mapping", lambda fs: put_mapping(fs, start=1 << 30)),
    "iommu-file-cut-below-a-mapping": ("iommu-end", ram(size=f.PAGE + 1)),
    "iommu-too-few-pins": ("iommu-pins", ram(iommu=0)),
    "iommu-too-many-pins": ("iommu-pins", ram(iommu=7)),
    "iommu-pins-of-a-file-that-is-not-mapped": ("iommu-pins", lambda fs: patch_inode(fs, fs.resolve(b"g"), iommu=1)),
    "iommu-pins-of-an-orphan": ("iommu-pins", orphan_of_mapping),
    "iommu-pins-of-a-directory": ("iommu-pins", lambda fs: patch_inode(fs, fs.resolve(b"d"), iommu=1)),
    "iommu-pins-of-a-link": ("iommu-pins", lambda fs: patch_inode(fs, fs.resolve(b"link"), iommu=1)),
    "iommu-awaiting-no-pages": ("iommu-record", bad_awaiting(b"iommu", length=0)),
    "iommu-awaiting-beyond-all-files": ("iommu-record", bad_awaiting(b"iommu", start=(1 << 64) - 1, length=2)),
    "iommu-awaiting-of-a-directory": ("iommu-awaiting", bad_awaiting(b"d")),
    "iommu-awaiting-of-tables": ("iommu-awaiting", bad_awaiting(b"iommu/dom-0")),
    "iommu-awaiting-of-nothing": (
        "iommu-awaiting",
        bad_record(f.ROOT_PGTABLES_INO, awaiting_key((1 << 44) - 1), AWAITED),
    ),
    "iommu-awaiting-and-not-pinned": (
        "iommu-pins",
        lambda fs: (domain(fs), patch_inode(fs, fs.resolve(b"was"), iommu=0)),
    ),
    "iommu-awaiting-what-is-not-pending": ("iommu-pending", not_pending),
    "iommu-feature-in-use-and-off": ("feature", feature_off),
    "iommu-attachment-to-nothing": (
        "iommu-attachment",
        bad_record(f.ROOT_PGTABLES_INO, f.ATTACHMENT_KEY + 9, f.ATTACHMENT.pack(f.Attachment(f.Ino(77), 1, 0))),
    ),
}
