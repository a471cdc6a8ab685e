"""The one exception for a user's mistake."""


class UserError(ValueError):
    """A mistake that the user can correct. Its text is one line that says what is wrong, where, and what to do.

    The command line prints that line without a traceback and exits with status 2. UserError is a ValueError, so that a
    program can catch it like NumPy's own.
    """
