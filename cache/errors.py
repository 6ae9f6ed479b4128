"""The one exception that commands turn into one line and an exit status."""


class UserError(Exception):
    """Something that the user can mend. The message is one line: what is wrong, where, and which command mends it."""
