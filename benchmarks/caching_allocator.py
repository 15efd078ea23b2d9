"""A model of PyTorch's caching allocator on CUDA: what it reserves for a sequence of allocations.

The rules are those of torch 2.13 (c10/cuda/CUDACachingAllocator.cpp): multiples of 512 bytes; small
blocks (up to 1 MiB) from segments of 2 MiB, others from segments of 20 MiB, or from their own, a
multiple of 2 MiB, from 10 MiB on; the smallest free block that is large enough; the rest of a block
is split off if it is large enough; free neighbours are joined. With expandable segments, one
segment for each of both kinds grows at its end, by pages of 2 or 20 MiB. Memory is never short, so
nothing is given back.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

MIB = 2**20

Event = tuple[int, int]
"""A block's number, and its bytes; 0 bytes free it."""


@dataclass(slots=True, eq=False)
class Block:
    """A part of a segment."""

    segment: int
    address: int
    size: int
    is_free: bool = True
    before: Block | None = None
    after: Block | None = None

    @property
    def key(self) -> tuple[int, int, int]:
        """Sort free blocks by size, then by address."""
        return self.size, self.segment, self.address


@dataclass
class Pool:
    """The small pool (up to 1 MiB) or the large one."""

    is_small: bool
    is_expandable: bool
    free: list[tuple[int, int, int]] = field(default_factory=list)
    blocks: dict[tuple[int, int], Block] = field(default_factory=dict)
    """Free blocks by segment and address."""
    reserved: int = 0
    """Bytes of all segments, as mapped."""
    tail: Block | None = None
    """Last block of the segment that grows."""

    def put(self, block: Block) -> None:
        block.is_free = True
        insort(self.free, block.key)
        self.blocks[block.segment, block.address] = block

    def take(self, block: Block) -> None:
        block.is_free = False
        self.free.pop(bisect_left(self.free, block.key))
        del self.blocks[block.segment, block.address]

    def find(self, size: int) -> Block | None:
        """Find the smallest free block that is large enough."""
        at = bisect_left(self.free, (size, -1, -1))
        fitting = [self.blocks[key[1:]] for key in self.free[at : at + 2]]
        # The end of a segment that grows counts as the largest.
        is_end = len(fitting) == 2 and fitting[0] is self.tail
        return fitting[is_end] if fitting else None

    def grow(self, size: int) -> Block:
        """Get memory from the device."""
        if not self.is_expandable:
            # Segments have different numbers: no two begin at the same total.
            block = Block(self.reserved, 0, segment_size(size))
            self.reserved += block.size
            return self._added(block)
        # One segment: the free memory at its end is part of the new block.
        page = 2 * MIB if self.is_small else 20 * MIB
        tail = self.tail
        missing = size - (tail.size if tail is not None and tail.is_free else 0)
        more = -(-missing // page) * page
        self.reserved += more
        if tail is not None and tail.is_free:
            self.take(tail)
            tail.size += more
            return self._added(tail)
        address = 0 if tail is None else tail.address + tail.size
        block = Block(0, address, more, before=tail)
        if tail is not None:
            tail.after = block
        self.tail = block
        return self._added(block)

    def _added(self, block: Block) -> Block:
        self.put(block)
        return block

    def split(self, block: Block, size: int) -> None:
        """Give back what a block has beyond the size, if that is enough."""
        rest = block.size - size
        if rest < 512 or not (self.is_small or self.is_expandable or rest > MIB):
            return
        other = Block(block.segment, block.address + size, rest, before=block, after=block.after)
        if block.after is not None:
            block.after.before = other
        block.after, block.size = other, size
        if self.tail is block:
            self.tail = other
        self.put(other)

    def release(self, block: Block) -> None:
        """Free a block, and join it with free neighbours."""
        for other in (block.before, block.after):
            if other is None or not other.is_free:
                continue
            self.take(other)
            first, second = (other, block) if other is block.before else (block, other)
            first.size += second.size
            first.after = second.after
            if second.after is not None:
                second.after.before = first
            if self.tail is second:
                self.tail = first
            block = first
        self.put(block)


def segment_size(size: int) -> int:
    """Return the bytes that are asked of the device for a block."""
    if size <= MIB:
        return 2 * MIB
    return 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB


def replay(events: Sequence[Event], *, is_expandable: bool) -> tuple[int, int]:
    """Return the peaks of allocated and of reserved bytes, on a card with memory to spare."""
    small, large = (Pool(is_small, is_expandable) for is_small in (True, False))
    live: dict[int, tuple[Pool, Block, int]] = {}
    allocated = most = 0
    for number, size in events:
        if size == 0:
            pool, block, held = live.pop(number)
            pool.release(block)
            allocated -= held
            continue
        size = max(512, -(-size // 512) * 512)
        pool = small if size <= MIB else large
        found = pool.find(size) or pool.grow(size)
        pool.take(found)
        pool.split(found, size)
        live[number] = pool, found, size
        allocated += size
        most = max(most, allocated)
    return most, small.reserved + large.reserved
