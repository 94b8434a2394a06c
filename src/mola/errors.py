"""`MolaError`, the error that means "the input is wrong, here is what to change"."""


class MolaError(ValueError):
    """Invalid input: the message names the field, the rule, the value received and the cure.

    It is a `ValueError`, so library users can catch it as usual. The command line prints the
    message alone and exits with code 2.
    """


class NotFiniteError(MolaError):
    """A computed loss, weight or answer is NaN or infinite.

    Attributes:
        was_interrupted: whether a signal had already asked the training to stop.
    """

    was_interrupted = False
