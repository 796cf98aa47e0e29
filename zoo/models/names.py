"""The one rule for the names of checkpoints: ``<data>_<architecture>_<operator>``."""

from zoo.models.spec import PLAIN


def name_ending(architecture: str, operator: str) -> str:
    """Return how the names of checkpoints of a network end, after that of the data."""
    return f"_{architecture}_{operator}"


def check_name(name: str, architecture: str, operator: str) -> None:
    """Refuse a checkpoint's name that does not say what the network is.

    Raises:
        ValueError: it is not called ``<data>_<architecture>_<operator>``.
    """
    expected = name_ending(architecture, operator)
    if not name.endswith(expected) or name == expected:
        raise ValueError(f"a checkpoint of this network is called <data>{expected}, got {name!r}")


def operator_in(name: str, architecture: str) -> str | None:
    """Return the operator that a checkpoint's name tells; None if it does not tell the architecture before it."""
    _, found, operator = name.rpartition(name_ending(architecture, ""))
    return operator if found else None


def family_of(name: str, operator: str) -> str:
    """Return what the names of a checkpoint's relatives begin with: those of the same data and architecture."""
    return name.removesuffix(operator)


def twin_of(name: str, operator: str) -> str:
    """Return the name of a checkpoint's plain twin."""
    return family_of(name, operator) + PLAIN


def is_plain(name: str) -> bool:
    """Return whether a checkpoint of that name is a plain twin."""
    return name.endswith(f"_{PLAIN}")
