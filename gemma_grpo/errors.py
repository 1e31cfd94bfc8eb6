"""The one exception that means "the user can mend this". Knows nothing else of the library."""


class UserError(Exception):
    """Bad input from outside. Its message is one line: what is wrong, where, and the mend.

    The command lines print it without a traceback and exit with status 2. It is no ValueError,
    since the flag parser would catch that and draw a frame around it.
    """
