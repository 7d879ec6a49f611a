"""Labels of lists, archives and arrays: from what stands there to the name of an identity."""

_NOT_A_NUMBER = ("nan", "NaN", "NAN")  # as programs write it; "Nan" is a name


class WrongLabel(ValueError):
    """Something that is no label; the message says what it is."""


def identity_of(label: object) -> str:
    """The name of the identity: text as it is; numbers with leading zeros, so that names sort as the numbers do.

    Raises:
        WrongLabel: the label is missing, empty, negative, or a number that is not whole.
    """
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, int) and not isinstance(label, bool):
        if label < 0:
            raise WrongLabel(f"the negative label {label}")
        return f"{label:08d}"
    if label is None or (isinstance(label, str) and not label.strip()):
        raise WrongLabel("no label")
    if isinstance(label, str) and label not in _NOT_A_NUMBER:
        return label
    raise WrongLabel(f"the label {str(label)[:100]}, which is neither text nor a whole number")
