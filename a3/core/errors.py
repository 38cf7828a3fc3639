"""The one exception that the command line turns into a message and a non-zero exit."""


class A3Error(Exception):
    """A user-correctable error: says which file, key or layer; found; expected; what to do."""
