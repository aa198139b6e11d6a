"""The one error that a user may cause and can mend."""


class RefineError(ValueError):
    """Bad input. The message is one line that names the file or field, the value and the remedy."""
