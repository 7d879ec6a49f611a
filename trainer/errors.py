"""The one error a user is meant to read."""


class UserError(ValueError):
    """Input that cannot be used. The message is one sentence: the value, what is allowed, what to do.

    The command line prints it without a traceback and exits with 2; anything else is a fault of the program.
    """


class Diverged(UserError):
    """The training's numbers are no longer finite; every rank raises it in the same step."""
