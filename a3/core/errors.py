"""The one exception that the command line turns into a message and a non-zero exit."""


class A3Error(Exception):
    """A user-correctable error: names the file, key or layer, and says what to do."""
