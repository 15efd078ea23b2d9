"""Errors for users, and the exit codes that a shell script sees."""

from typing import ClassVar

EXIT_DEADLINE = 5
EXIT_DIFFERENT = 7
EXIT_FAILED_CELLS = 8
EXIT_SIGNAL = 128
"""Plus the number of the signal, as shells count."""

EXIT_CODES = {
    0: "success",
    1: "internal error: please report it",
    2: "the command line, the recipe or the data cannot be used",
    3: "the model or adapter cannot be found, loaded, adapted or merged",
    4: "training stopped before its end, or its result cannot be trusted",
    5: "stopped by training.stop_after; the run is saved, and --resume continues it",
    6: "out of memory during training; the run is saved up to then",
    7: "a repeated run (rerun) has a different result",
    8: "some cells of a comparison failed; the others are complete",
    9: "standard output is full or closed; files are written as usual",
    130: "interrupted by Ctrl-C; a run is saved first",
    143: "interrupted by SIGTERM; a run is saved first",
}
"""All exit codes: the help of `qlora` prints this table."""


class QloraError(Exception):
    """An error with a message for the user. The command line prints it without a traceback.

    A traceback in Python shows the hint below the message.

    Args:
        message: what is wrong, where, what was found and what is allowed.
        hint: the best thing to do next, if there is one.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")


class RecipeError(QloraError):
    """The recipe (YAML, keys, values, combinations) or the command line cannot be used."""

    exit_code = 2


class DataError(QloraError):
    """Rows cannot be read, formatted or trained on."""

    exit_code = 2


class ModelError(QloraError):
    """The base model or adapter cannot be found, loaded, adapted or merged."""

    exit_code = 3


class TrainingError(QloraError):
    """Training stopped before its end, or its result cannot be trusted."""

    exit_code = 4


class OutOfMemory(QloraError):
    """The machine has no more memory. The run has been saved."""

    exit_code = 6


class OutputFailed(QloraError):
    """Standard output is full or closed."""

    exit_code = 9


class Interrupted(BaseException):
    """The command was asked to end; a run is saved.

    Like KeyboardInterrupt it is not an `Exception`, so `except Exception` does not swallow it.
    """

    def __init__(self, reason: str, exit_code: int) -> None:
        super().__init__(reason)
        self.exit_code = exit_code
        self.kept: str | None = "nothing was kept of its result"
        """The files that are left, in words for the user; None if that was logged."""
