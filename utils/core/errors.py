"""The one exception that means "the user can mend this"; verbs print it as a single line."""


class UserError(ValueError):
    """Bad input: the message says what was given, what was expected and what to do, in one line."""
