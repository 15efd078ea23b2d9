"""Limits on untrusted templates, in addition to those of Jinja's sandbox.

The sandbox keeps a template from attributes that lead to code, and from a `range` of more than
100,000. It does not keep it from two of them in one another, or from a power with a billion digits.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from qlora_cli.errors import ModelError

SECONDS = 2.0
"""Seconds of processor time per text. The slowest conversation takes some milliseconds."""


class OutOfTimeError(ModelError):
    """A template took too long."""


def refuse_endless(template: str, name: str) -> None:
    """Refuse powers: a power is one instruction, which a timer cannot interrupt.

    Jinja computes `10 ** 10 ** 10` when it compiles, before anything is rendered.

    Args:
        name: of the template, for the message.

    Raises:
        ModelError: the template has one. What is wrong otherwise is told when it is used.
    """
    import jinja2

    try:
        # Its words and not its tree: transformers reads tags that Jinja does not know.
        words = list(jinja2.Environment().lex(template))
    except jinja2.TemplateSyntaxError:
        return
    for line, kind, word in words:
        if (kind, word) == ("operator", "**"):
            raise ModelError(
                f"{name}, line {line}: a power (**) can take forever, and is not allowed",
                hint="multiply, or name another template",
            )


@contextmanager
def limited_time(name: str, seconds: float = SECONDS) -> Iterator[None]:
    """Interrupt the block if it takes too long. Works only in the main thread.

    Raises:
        OutOfTimeError: the block took too long.
    """
    is_main = threading.current_thread() is threading.main_thread()
    # Windows has no such clock.
    if not is_main or not hasattr(signal, "setitimer"):
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError(f"{name}: not finished after {seconds:g} s")

    # The clock of this process's own work: a busy or sleeping machine does not count.
    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
