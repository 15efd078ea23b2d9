"""Paths that users write, in recipes and on the command line: `~` is expanded, `$NAME` refused."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

_VARIABLE = re.compile(r"\$(?:\w+|\{[^}]*\})")


_MOST_NAMES = 1000
"""Names of a folder that are compared with a misspelt one."""


def expand_path(text: str) -> str:
    """Return a path with `~` replaced by the home folder.

    Raises:
        ValueError: it names a user who does not exist, or an environment variable. A file or folder
            whose name really looks like that is accepted.
    """
    path = os.path.expanduser(text)
    if os.path.lexists(path):
        return path
    if path.startswith("~"):
        name = path.split(os.sep)[0]
        raise ValueError(
            f'found "{text}", and {name} is not the home folder of a user; write the path out, or '
            f"./{name} for a folder of that name"
        )
    if variable := _VARIABLE.search(path):
        raise ValueError(
            f'found "{text}"; environment variables ({variable[0]}) are not read here: write the '
            "path out, or let the shell fill it in, in an option without single quotes"
        )
    return path


def missing_path_hint(path: str) -> str:
    """Say what a path that does not exist may have meant, and where relative paths start."""
    near = similar_path(path)
    meant = f"did you mean {near}? " if near else ""
    return f"{meant}a relative path starts at the current folder, {Path.cwd()}"


def similar_path(path: str) -> str | None:
    """Return the existing path that is most like one that does not exist; None if none is."""
    absent = Path(path)
    while absent.parent != absent and not absent.parent.exists():
        absent = absent.parent
    try:
        names = [entry.name for entry in islice(absent.parent.iterdir(), _MOST_NAMES)]
    except OSError:
        return None  # a file, or a folder that cannot be read: no suggestion
    # Endings are much alike: without them, `test.jsonl` is not similar to `rows.jsonl`.
    stems = {Path(name).stem.lower() for name in names}
    near = get_close_matches(absent.stem.lower(), stems, n=3)
    alike = [name for name in sorted(names) if Path(name).stem.lower() in near]
    if not alike:
        return None
    found = absent.parent / get_close_matches(absent.name, alike, n=1, cutoff=0)[0]
    whole = found / Path(path).relative_to(absent)
    return str(whole if whole.exists() else found)
