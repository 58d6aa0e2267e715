"""Numbers and lists as people read them."""

_MOST_LISTED = 10


def readable_bytes(count: float) -> str:
    """In decimal units, for people."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def counted(count: int, what: str) -> str:
    """`1 class`, `2 classes`: for words that form their plural so."""
    ending = "" if count == 1 else "es" if what.endswith("s") else "s"
    return f"{count} {what}{ending}"


def listed(samples: list[int]) -> str:
    """As a list is written; of many the first ones."""
    more = len(samples) - _MOST_LISTED
    return f"{samples[:_MOST_LISTED]}{f' and {more} more' if more > 0 else ''}"
