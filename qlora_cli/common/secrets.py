"""Secrets in a text: what must not be written into a run folder, nor into a log.

A recipe has no place for secrets. Whoever needs a token for the hub gives it to the hub's own tool
(`hf auth login`, or $HF_TOKEN), and it is never asked for here.
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
    """What kind of secret a text holds, in words; None if it holds none that is known."""
    return next((words for pattern, words in _KINDS if pattern.search(text)), None)


def masked(text: str) -> str:
    """The text with its secrets hidden."""
    for pattern, _ in _KINDS:
        text = pattern.sub(lambda found: ((found.lastindex and found[1]) or "") + _HIDDEN, text)
    return text


class MaskedFormatter(logging.Formatter):
    """Hides secrets in whatever is logged, such as a path that the user typed."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))
