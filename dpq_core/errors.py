"""The error that a user can mend."""


class InputError(ValueError):
    """Something is wrong with what was given, not with the program.

    The message is one line: what it is, where, and the way out. Each kind of input has its own
    subclass.
    """
