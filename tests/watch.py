"""Record what this process opens, writes and connects to, by audit hooks (PEP 578)."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NAMELESS = getattr(os, "O_TMPFILE", 0)
_CHANGES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate",
    "os.chmod", "os.chown",
}  # fmt: skip


class Watch:
    """Files and sockets that were used while watching."""

    def __init__(self) -> None:
        self.opened: set[str] = set()
        """Files, for reading or writing."""
        self.written: set[str] = set()
        """Files and folders that were opened to be written, made, renamed or removed."""
        self.sockets: list[str] = []

    def written_outside(self, *folders: Path) -> list[str]:
        """List what was written outside all of the folders."""
        allowed = [folder.resolve() for folder in folders]
        return sorted(
            path
            for path in self.written
            if not path.startswith("/dev/")
            and not any(Path(path).resolve().is_relative_to(one) for one in allowed)
        )

    def see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes):
                self.opened.add(os.fsdecode(path))
                if flags & _WRITES and flags & _NAMELESS != _NAMELESS:
                    self.written.add(os.fsdecode(path))
        elif event in _CHANGES:
            paths = arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]
            self.written.update(os.fsdecode(p) for p in paths if isinstance(p, str | bytes))
        elif event in ("socket.__new__", "socket.connect", "socket.getaddrinfo", "socket.bind"):
            self.sockets.append(f"{event} {arguments[1:]}")


_watches: list[Watch] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(("open", "os.", "socket.")):
        for watch in _watches:
            watch.see(event, arguments)


@contextmanager
def watching() -> Iterator[Watch]:
    """Watch this process. (A hook cannot be removed, so all watches share one.)"""
    if not getattr(sys, "_qlora_is_watched", False):
        sys.addaudithook(_hook)
        sys._qlora_is_watched = True  # type: ignore[attr-defined]  # set here only
    watch = Watch()
    _watches.append(watch)
    try:
        yield watch
    finally:
        _watches.remove(watch)
