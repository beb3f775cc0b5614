"""The exceptions that become a line on stderr and an exit code, not a traceback."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, told in one line that names the key, file or value and the mend (exit code 2)."""

    code = 2


class CheckFailed(RuntimeError):  # noqa: N818
    """A check of the product's own fell short; the line gives the figures (exit code 1)."""

    code = 1


class Stopped(Exception):  # noqa: N818
    """A signal ended the run after a clean save; ``code`` is the exit code (130 or 143).

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the state was saved")
        self.code = 128 + number


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The known name nearest to a wrong one, if any.

    First a name of which it is the part before the hyphen, as a method is of a config's, or the
    other way round; then that whose last letter is doubled.
    """
    known = list(known)
    kin = [one for one in known if one.startswith(f"{name}-") or name.startswith(f"{one}-")]
    if kin:
        return kin[:1]
    near = difflib.get_close_matches(name, known, 3, cutoff)
    return sorted(near, key=lambda one: name != one + one[-1:])[:1]


def hint(name: str, known: Iterable[str], otherwise: str = "known are") -> str:
    """The end of a line on a name that there is not: the known one nearest to it, or all of them.

    Args:
        name: what was written.
        known: what could have been.
        otherwise: what the list of all begins with.
    """
    names = list(known)
    near = nearest(name, names)
    return f"did you mean {near[0]}?" if near else f"{otherwise} {', '.join(names)}"
