"""What can go wrong with data that lies elsewhere."""


class DataUnavailable(OSError):
    """Data, or a tokenizer, that is neither here nor to be had now; the message is one line."""

    exit_code = 3


class PackageMissing(OSError):
    """A package that an extra installs is not here; the message is one line."""

    exit_code = 3


class NoSpace(OSError):
    """A disk has no room for what is to be written; the message is one line."""

    exit_code = 3


class Interrupted(Exception):
    """A signal ended work that goes on where it was; the message says how, in one line."""

    exit_code = 6
