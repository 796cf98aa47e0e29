"""Names looked up in a table: the one place that words an unknown name."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

Value = TypeVar("Value")


def unknown_name(what: str, name: object, legal: Iterable[str], unlisted: Collection[str] = ()) -> str:
    """Say that ``name`` is no ``what``, which names are, and which of them is nearest.

    Args:
        unlisted: names that are legal too, but too many to list.
    """
    legal = sorted(legal)
    nearest = difflib.get_close_matches(str(name), [*legal, *unlisted], n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    more = f", or one of {len(unlisted)} more" if unlisted else ""
    return f"unknown {what} {name!r}.{hint} Choose one of: {', '.join(legal) or '(none)'}{more}."


def look_up(table: Mapping[str, Value], name: str, what: str) -> Value:
    """Return ``table[name]``.

    Raises:
        ValueError: ``name`` is not in ``table``; the message lists the legal names and the nearest one.
    """
    if not isinstance(name, str) or name not in table:
        raise ValueError(unknown_name(what, name, table))
    return table[name]
