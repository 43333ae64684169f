"""A segment: one file of the disk tier, with a table of headers in front of its slots.

=====================  ================================================================
offset                 bytes
=====================  ================================================================
0                      one page: magic, version, slots, payload bytes, layout fingerprint
a page                 ``slots`` headers of ``HEADER_BYTES`` (``format.py``), whole pages
the slots              each payload padded to whole pages
=====================  ================================================================

The headers of all slots are read at once at start. A slot's payload is written before its header; since the header has
the payload's digest, no order of writes that reached the disk, and no torn one, makes a block that verifies wrongly.
"""

import os
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from twostroke.kv.direct import PAGE, Extent, File, aligned, open_direct, pages, read_at, write_at
from twostroke.kv.keys import KEY_BYTES, BlockKey
from twostroke.store.format import (
    FIELDS,
    HEADER_BYTES,
    MAGIC,
    PINNED,
    VERSION,
    Corrupt,
    Header,
    check,
    pack,
    unpack,
)

_MAGIC = b"2STRKSEG"
_FIELDS = struct.Struct("<8sIIQ16s")
MAX_SLOTS = 1 << 24


class Index(NamedTuple):
    """The blocks of a segment."""

    keys: list[BlockKey]
    slots: npt.NDArray[np.int64]  # by key
    written: npt.NDArray[np.uint64]  # by key: unix seconds
    pinned: npt.NDArray[np.int64]  # slots


class Segment:
    """One open segment file. All methods may be called from several threads, for different slots."""

    def __init__(self, fd: int, slots: int, block_bytes: int, fingerprint: bytes, table: memoryview) -> None:
        """``table``: its first pages, up to the slots."""
        self.slots = slots
        self._file = File(fd)
        self._block_bytes = block_bytes
        self._fingerprint = fingerprint
        self._table = table
        self._stride = pages(block_bytes)
        self._lock = threading.Lock()  # of the table: several slots share a page

    @staticmethod
    def file_bytes(slots: int, block_bytes: int) -> int:
        """How large a segment's file is."""
        return PAGE + pages(slots * HEADER_BYTES) + slots * pages(block_bytes)

    @classmethod
    def create(cls, directory: int, name: str, slots: int, block_bytes: int, fingerprint: bytes) -> "Segment":
        """A new file in an open directory; all of its space is taken now. ``OSError`` if there is not enough."""
        fd = open_direct(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, dir_fd=directory)
        try:
            os.posix_fallocate(fd, 0, cls.file_bytes(slots, block_bytes))
            table = aligned(PAGE + slots * HEADER_BYTES)
            table[: _FIELDS.size] = _FIELDS.pack(_MAGIC, VERSION, slots, block_bytes, fingerprint)
            write_at(fd, table, 0)
        except OSError:
            os.close(fd)
            os.unlink(name, dir_fd=directory)
            raise
        return cls(fd, slots, block_bytes, fingerprint, table)

    @classmethod
    def open(cls, directory: int, name: str, block_bytes: int, fingerprint: bytes) -> "Segment":
        """A file that is there already.

        Raises:
            Corrupt: it is no segment, or one of another version or layout.
            OSError: it cannot be read.
        """
        fd = open_direct(name, os.O_RDWR, dir_fd=directory)
        try:
            size = os.fstat(fd).st_size
            page = aligned(PAGE)
            if size < PAGE:
                raise Corrupt("the file is cut off")
            read_at(fd, page, 0)
            magic, version, slots, length, layout = _FIELDS.unpack(page[: _FIELDS.size])
            if (magic, version) != (_MAGIC, VERSION):
                raise Corrupt(f"it is no segment of format {VERSION}")
            if (length, layout) != (block_bytes, fingerprint):
                raise Corrupt("it is of another layout")
            if not 0 < slots <= MAX_SLOTS or size < cls.file_bytes(slots, block_bytes):
                raise Corrupt("the file is cut off")
            table = aligned(PAGE + slots * HEADER_BYTES)
            read_at(fd, table, 0)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, slots, block_bytes, fingerprint, table)

    @staticmethod
    def payload_bytes(directory: int, name: str) -> int:
        """How long the payloads of a segment are, as its file says.

        Raises:
            Corrupt: it is no segment.
            OSError: it cannot be read.
        """
        fd = open_direct(name, os.O_RDONLY, dir_fd=directory)
        try:
            page = aligned(PAGE)
            if os.fstat(fd).st_size < PAGE:
                raise Corrupt("the file is cut off")
            read_at(fd, page, 0)
        finally:
            os.close(fd)
        magic, version, _, length, _ = _FIELDS.unpack(page[: _FIELDS.size])
        if (magic, version) != (_MAGIC, VERSION) or not 0 < length < 1 << 40:
            raise Corrupt(f"it is no segment of format {VERSION}")
        return int(length)

    @property
    def size(self) -> int:
        """Bytes of its file."""
        return self.file_bytes(self.slots, self._block_bytes)

    @property
    def removed(self) -> bool:
        """Whether its file has no name any more: nobody would find it at the next start."""
        return os.fstat(self._file.fd).st_nlink == 0

    def index(self) -> Index:
        """What the headers say. They are verified when they are read: a damaged one may name what is not there."""
        table = np.frombuffer(self._table, FIELDS, self.slots, PAGE)
        good = (table["magic"] == MAGIC) & (table["version"] == VERSION) & (table["length"] == self._block_bytes)
        slots = np.flatnonzero(good & (table["fingerprint"] == np.void(self._fingerprint)))
        raw = table["key"][slots].tobytes()
        keys = [raw[at : at + KEY_BYTES] for at in range(0, len(raw), KEY_BYTES)]
        return Index(keys, slots, table["written"][slots], slots[(table["flags"][slots] & PINNED) != 0])

    def headers(self) -> list[tuple[int, Header]]:
        """Slots with a good header, and those headers."""
        found = []
        for slot in self.index().slots.tolist():
            at = PAGE + slot * HEADER_BYTES
            with suppress(Corrupt):
                found.append((slot, unpack(self._table[at : at + HEADER_BYTES])))
        return found

    def payload(self, slot: int) -> Extent:
        """Where a slot's payload is in the file."""
        return Extent(self._file, self._offset(slot), self._block_bytes)

    def digest(self, slot: int, key: BlockKey) -> bytes:
        """What the payload's digest must be, if this slot has this block.

        Raises:
            Corrupt: it has another one.
        """
        at = PAGE + slot * HEADER_BYTES
        header = unpack(self._table[at : at + HEADER_BYTES])
        check(header, key, self._fingerprint, self._block_bytes)
        return header.digest

    def label(self, slot: int, key: BlockKey, digest: bytes) -> None:
        """This slot's payload is that of this block; it is found after a restart once ``commit`` has returned."""
        header = Header(key, self._fingerprint, self._block_bytes, int(time.time()), digest)
        with self._lock:
            self._set(slot, pack(header))

    def forget(self, slot: int) -> None:
        """No block is in this slot any more. ``OSError``."""
        with self._lock:
            self._set(slot, bytes(HEADER_BYTES))
        self.commit([slot])

    def pin(self, slots: Sequence[int], pinned: bool) -> None:
        """Say in the headers of these slots whether their blocks may be evicted. ``OSError``."""
        with self._lock:
            for slot in slots:
                at = PAGE + slot * HEADER_BYTES
                with suppress(Corrupt):  # when it is read, that shows
                    self._set(slot, pack(unpack(self._table[at : at + HEADER_BYTES])._replace(pinned=pinned)))
        self.commit(slots)

    def commit(self, slots: Sequence[int]) -> None:
        """Write the headers of these slots. ``OSError``."""
        with self._lock:
            for page in sorted({PAGE + slot * HEADER_BYTES // PAGE * PAGE for slot in slots}):
                write_at(self._file.fd, self._table[page : page + PAGE], page)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _set(self, slot: int, raw: bytes) -> None:
        at = PAGE + slot * HEADER_BYTES
        self._table[at : at + HEADER_BYTES] = raw

    def _offset(self, slot: int) -> int:
        return PAGE + pages(self.slots * HEADER_BYTES) + slot * self._stride
