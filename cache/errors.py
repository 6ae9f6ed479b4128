"""The one exception that commands turn into one line and an exit status."""

from __future__ import annotations

import shlex


class UserError(Exception):
    """Something that the user can mend. The message is one line: what is wrong, where, and which command mends it."""

    def __init__(self, message: str) -> None:
        """Args: `message`, in which a stranger's line breaks and terminal codes lose their power."""
        super().__init__("".join(letter if letter.isprintable() else "?" for letter in message))


class MissingError(UserError):
    """A file that is not there."""


class UnreadableError(UserError):
    """A file that exists and cannot be read: permissions, disk or network. It is not damaged, and is not missing."""


def command(*words: object) -> str:
    """A command line for such a message, quoted so that it can be pasted into a shell."""
    return shlex.join(map(str, words))
