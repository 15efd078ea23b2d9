"""Ways in which a file on a disk may be damaged. An empty file has no bits to flip."""

from __future__ import annotations

from collections.abc import Callable


def flipped(data: bytes) -> bytes:
    """Flip one bit in the middle."""
    if not data:
        return data
    at = len(data) // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a bit flipped": flipped,
    "the last bit flipped": lambda data: data[:-1] + bytes(byte ^ 128 for byte in data[-1:]),
    "zeroed": lambda data: bytes(len(data)),
    "truncated": lambda data: data[:-1],
    "emptied": lambda data: b"",
    "lengthened": lambda data: data + (data[-1:] or b"\0"),
}
