"""What may be printed, and the errors that end a command with one line."""


def printable(text):
    """Text with U+FFFD for what a terminal would obey: line feeds, ESC, right-to-left overrides."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text))


def one_line(message):
    """A printable line of at most 600 characters: a message may quote an option of any length."""
    line = printable(message)
    return line if len(line) <= 600 else f"{line[:300]} ... {line[-290:]}"


class UserError(ValueError):
    """A mistake in the user's data or options: one line, what was expected and where."""

    def __init__(self, message):
        super().__init__(one_line(message))


class CheckFailed(RuntimeError):
    """What must hold does not: a mistake in the program or its settings."""
