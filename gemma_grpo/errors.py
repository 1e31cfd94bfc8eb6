"""The one exception that means "the user can mend this". Knows nothing else of the library."""


class UserError(Exception):
    """Bad input from outside. Its message is one line: what is wrong, where, and the mend.

    The command lines print it without a traceback and exit with status 2. Not a ValueError: the flag
    parser would catch that and put a frame around it.
    """
