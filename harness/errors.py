"""What may be printed, and the errors that end a command with one line."""


def printable(text):
    """Text with U+FFFD for what a terminal would obey: line feeds, ESC, right-to-left overrides."""
    return "".join(c if c.isprintable() else "\ufffd" for c in str(text))


class UserError(ValueError):
    """A mistake in the user's data or options: one printable line, what was expected and where."""

    def __init__(self, message):
        super().__init__(printable(message))    # it may quote a file name or a text


class CheckFailed(RuntimeError):
    """What must hold does not: a mistake in the program or its settings."""
