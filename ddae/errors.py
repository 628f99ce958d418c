"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake that the user can mend; its message is one plain sentence with the field, the value and the mend.

    The commands print it without a traceback, on one rank, and exit with code 2.
    """
