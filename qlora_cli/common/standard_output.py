"""Write results to standard output, which may be full or closed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from qlora_cli.errors import OutputFailed


def write_output(text: str) -> None:
    """Write text, and see it through to the file, pipe or terminal.

    Raises:
        OutputFailed: standard output is full or closed.
    """
    if sys.stdout is None:
        raise OutputFailed("standard output is closed, so the result cannot be written")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise _failed(error) from error


@contextmanager
def guarded_output() -> Iterator[None]:
    """Do the same for what others write to standard output, such as help.

    Raises:
        OutputFailed: standard output is full or closed.
    """
    try:
        yield
    except OSError as error:
        try:
            print(flush=True, file=sys.stdout)
        except OSError:
            raise _failed(error) from error
        raise


def _failed(error: OSError) -> OutputFailed:
    # Python writes what is left when it ends, and would complain once more.
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return OutputFailed(f"standard output: {error.strerror or error}; the result is not complete")
