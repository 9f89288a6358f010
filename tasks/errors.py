"""What can go wrong with data that lies elsewhere."""


class DataUnavailable(OSError):
    """Data, or a tokenizer, that is neither here nor to be had now; the message is one line."""

    exit_code = 3
