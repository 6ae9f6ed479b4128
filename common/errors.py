"""Errors that commands print as one line."""

from __future__ import annotations

import difflib
import shlex
import unicodedata
from collections.abc import Collection

UNPRINTED = {"Cc", "Cf", "Zl", "Zp"}
"""Unicode categories: control characters, direction marks, line and paragraph separators."""

INTERRUPTED = 130
"""Exit status after SIGINT."""
STOPPED = 75
"""Exit status after a signal of a batch system, EX_TEMPFAIL: the same command resumes, so the job can be requeued on it."""


class Stopped(KeyboardInterrupt):
    """A batch system asked this process to stop."""


class UserError(Exception):
    """Something that the user can fix. The message is one line: what is wrong, where, and a hint."""

    def __init__(self, message: str) -> None:
        """Escape the message, see `one_line`."""
        super().__init__(one_line(message))


class MissingError(UserError):
    """A file that does not exist."""


class UnreadableError(UserError):
    """A file that cannot be read because of permissions, the disk or the network. It is neither damaged nor missing."""


def reason(error: BaseException, most: int = 160) -> str:
    """Return an error's text in one line of at most `most` characters; of an OSError, the system's message."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".")[:most] or type(error).__name__


def suggest(name: str, known: Collection[str]) -> str:
    """Hint at the names that are nearest to an unknown one, or at all that are known."""
    close = difflib.get_close_matches(name, known)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"


def one_line(text: str) -> str:
    r"""Return text with line breaks and control characters escaped, as `\n`: names of files may contain them."""
    return "".join(
        letter.encode("unicode_escape").decode() if unicodedata.category(letter) in UNPRINTED else letter
        for letter in text
    )


def command(*words: object) -> str:
    """Return a command line that can be pasted into a shell."""
    return " ".join(_quoted(str(word)) for word in words)


def _quoted(word: str) -> str:
    if one_line(word) == word:
        return shlex.quote(word)
    # Bash and zsh read $'…' with escapes.
    return "$'" + one_line(word.replace("\\", r"\\").replace("'", r"\'")) + "'"
