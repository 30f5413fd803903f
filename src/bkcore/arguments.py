"""Checks of arguments, and help with misspelt ones, without PyTorch."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from bkcore.errors import InputError
from bkcore.reading import shown

_LONGEST, _MOST = 100, 5
"""Longer names are near nothing, and of many names the first ones are looked at: a file by somebody
else may hold a million of them, and comparing takes long."""


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """Suggest the known names nearest to a misspelt one, as the end of a message.

    Args:
        given: the misspelt name, or a list of them. Nothing is near a value that is no text.
        known: the names that would be right.

    Returns:
        "; did you mean 'steps'?", or an empty text if nothing is near.
    """
    by_lower = {name.lower(): name for name in known}
    found: dict[str, None] = {}  # in order, each once
    for name in given[:_MOST] if isinstance(given, list) else [given]:
        if isinstance(name, str) and len(name) <= _LONGEST:
            near = get_close_matches(name.lower(), by_lower, n=2)
            found |= dict.fromkeys(by_lower[each] for each in near)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def starting_with(only: str, names: Iterable[str], kind: str) -> list[str]:
    """Choose the names that start with `only`.

    Args:
        only: the start of the names; empty for all.
        names: of all there are.
        kind: what they are names of, such as "case".

    Raises:
        InputError: if no name does.
    """
    names = list(names)
    found = [name for name in names if name.startswith(only)]
    if not found:
        raise InputError(
            f"no {kind}'s name starts with {only!r}; the {kind}s are {', '.join(names)}"
            f"{did_you_mean(only, names)}"
        )
    return found


def check_group_size(group_size: int) -> None:
    """Raise `InputError` unless `group_size` is an integer of at least 1."""
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise InputError(
            f"group_size must be an integer >= 1, not {shown(group_size)}; "
            "1 gives every channel its own scale"
        )
