"""The one exception for a user's mistake."""


class UserError(ValueError):
    """A mistake that the user can mend: one line that says what, where and what to do.

    The command line prints it without a traceback and exits with status 2. It is a ValueError, so that a
    program which calls the library catches it as it would catch NumPy's.
    """
