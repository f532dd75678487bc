"""The exceptions that a command turns into one line and an exit code; every other one keeps its traceback."""


class InputError(ValueError):
    """What the user gave is wrong (exit 2). The message names the value, the place (file:line or flag), the remedy."""


class CheckFailed(RuntimeError):
    """A check that the command was asked to make did not hold (exit 1). The message gives the bar and the value."""


class StopRequested(BaseException):
    """SIGTERM or SIGUSR1 arrived (exit 75). A BaseException, so that no handler for errors takes it for one."""
