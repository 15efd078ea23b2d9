"""What can go wrong for a user, and the exit code that a shell script sees for it.

QloraError
├── RecipeError      2   the recipe (YAML, keys, values, combinations) cannot be used
├── DataError        2   rows that cannot be read, formatted or learnt from
├── ModelError       3   the base model or adapter cannot be found, loaded, adapted or merged
├── TrainingError    4   training stopped before its end, or its result cannot be trusted
└── OutOfMemory      6   the machine has no more memory; what was learnt is saved

Interrupted              the run ended as it was asked to, and is saved
  training.stop_after  5
  Ctrl-C             130
  SIGTERM            143

A run that was repeated (`qlora rerun`) with another result: 7
A comparison (`qlora compare`) with cells that failed: 8

Success: 0. Anything else (1) is a bug of ours.
"""

from typing import ClassVar

EXIT_DEADLINE = 5
EXIT_SIGNAL = 128
"""Plus the number of the signal, as shells count."""
EXIT_INTERRUPTED = 130
EXIT_DIFFERENT = 7
EXIT_FAILED_CELLS = 8


class QloraError(Exception):
    """An error with a message for the user. The command line prints it without a traceback.

    Args:
        message: what is wrong, where, what was found and what is allowed.
        hint: what to do next, if there is one best next thing.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class RecipeError(QloraError):
    exit_code = 2


class DataError(QloraError):
    exit_code = 2


class ModelError(QloraError):
    exit_code = 3


class TrainingError(QloraError):
    exit_code = 4


class OutOfMemory(QloraError):
    exit_code = 6


class Interrupted(BaseException):
    """The run was asked to end. Like KeyboardInterrupt, it is no Exception: nothing swallows it."""

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code
