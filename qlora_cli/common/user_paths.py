"""Paths that users write, in recipes and on the command line: `~` is expanded, `$NAME` refused."""

from __future__ import annotations

import os
import re

_VARIABLE = re.compile(r"\$(?:\w+|\{[^}]*\})")


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
