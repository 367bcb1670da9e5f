"""The one exception that means "the user can mend this"; verbs print it as a single line."""

_JOINERS = "\u200c\u200d"  # unprintable by Unicode, yet part of words and emoji


class UserError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do, in one line."""


def printable(value: object, limit: int = 200) -> str:
    """Text from a file as one short line: white space as blanks, other unprintable characters escaped, the rest cut."""
    text = str(value)
    line = "".join(
        c if c.isprintable() or c in _JOINERS else " " if c.isspace() else c.encode("unicode_escape").decode()
        for c in text[:limit]
    )
    return line if len(text) <= limit else f"{line}..."
