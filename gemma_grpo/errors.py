"""The one exception that means "the user can mend this". Knows nothing else of the library."""


class UserError(ValueError):
    """Bad input from outside. Its message is one line: what is wrong, where, and the mend.

    The command lines print it without a traceback and exit with status 2.
    """
