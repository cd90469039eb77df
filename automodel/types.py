"""Small types that everything may import; none of them needs torch."""

from enum import IntEnum

IGNORE_INDEX = -100
"""The label of a position that is not supervised (torch's own default)."""


class ExitStatus(IntEnum):
    """How a run ends; a scheduler may requeue a job that ended with STOPPED."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    STOPPED = 75


class RunError(RuntimeError):
    """A run or verb failed, and the message says all that helps: printed without a traceback, status 1."""


class UserError(Exception):
    """The input is wrong: the problems are printed without a traceback, and the exit status is 2.

    Takes one line per problem, so all are reported together.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple:
        return (type(self), self.problems)
