"""Find and mask secrets, which must not get into a run folder or a log.

Recipes never contain secrets. A token for the Hub is given to the Hub's own tool (`hf auth login`,
or $HF_TOKEN); nothing here asks for it.
"""

from __future__ import annotations

import logging
import re

_HIDDEN = "***"

_KINDS = (
    # user:password@ of an address, and a user alone, which may be a token.
    # (One slash: a path does not keep two of them.)
    (re.compile(r"(:/{1,2})[^\s/@'\"]+(?=@)"), "a user name or password in an address"),
    (
        re.compile(
            r"(?i)(?<=[?&])([\w.-]*(?:token|key|secret|passw(?:or)?d|signature|credentials?|sig)=)"
            r"[^\s&#'\"]+"
        ),
        "a secret in the query of an address",
    ),
    (
        re.compile(
            r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-(?:proj-|ant-)?|xox[abpr]-|AKIA|ASIA|AIza)"
            r"[\w-]{16,}"
        ),
        "a token",
    ),
)


def find_secret(text: str) -> str | None:
    """Name the kind of secret that a text contains, or return None if no known kind is found."""
    return next((words for pattern, words in _KINDS if pattern.search(text)), None)


def masked(text: str) -> str:
    """Replace each secret in a text with ***."""
    for pattern, _ in _KINDS:
        text = pattern.sub(lambda found: ((found.lastindex and found[1]) or "") + _HIDDEN, text)
    return text


class MaskedFormatter(logging.Formatter):
    """Masks secrets in all log messages, for example in a path that the user typed."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))
