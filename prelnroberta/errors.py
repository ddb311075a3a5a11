"""The exception for invalid user input."""


class InputError(ValueError):
    """Invalid input: a flag, file, key or value that the caller can fix.

    The message is complete on its own: it says what was found, what was expected and what to do.
    Programs print it as one line and exit. Every other exception is a bug and keeps its traceback.
    """
