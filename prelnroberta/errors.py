"""The one exception that means: what the user gave is wrong, and the message says all of it."""


class InputError(ValueError):
    """Bad input: a flag, file, key or value that the caller can mend.

    The message is complete on its own: it names the offender, what was expected and what to do.
    Programs print it as one line and exit; every other exception is a bug and keeps its traceback.
    """
