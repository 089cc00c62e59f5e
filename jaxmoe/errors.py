"""The one exception that means "the user, or the user's file, is at fault"."""


class UserError(ValueError):
    """Bad input or a bad option: one line that names the thing, what was expected and what was found.

    `jaxmoe.cli.arguments.run` turns it into that line on stderr and exit code 2; every other exception is a bug.
    """
