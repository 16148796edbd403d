"""What an error says, in one line. (`dpq_core.errors` has the same: neither knows the other.)"""


def one_line(error: BaseException, most: int | None = None) -> str:
    """All that an error says, in one line of at most so many characters; its type where it says
    nothing."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]
