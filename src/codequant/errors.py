"""What a user can hit. Each class is one exit code of the command line; 1 is left for the unexpected."""


class InputError(ValueError):
    """Bad input, found before any long work starts: one line naming the thing, its value and what was expected."""

    exit_code = 2


class VerificationError(RuntimeError):
    """A finished output folder does not hold what it promises; the message names the check and the tensor."""

    exit_code = 3


class InvarianceError(RuntimeError):
    """Folding or rotating changed what a layer computes; the message names the layer where the paths part."""

    exit_code = 3
