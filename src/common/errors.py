"""The one exception that a user's own input can cause; a command turns it into one line and exit code 2."""


class InputError(ValueError):
    """What the user gave is wrong. The message names the value, the place (file:line or flag) and the remedy."""
