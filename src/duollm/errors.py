"""The one error style: a line that says what was given, what is allowed and how to mend it."""

import errno
import os
import re
from collections.abc import Iterable
from difflib import get_close_matches

_SPACE = "free some space, or write to another disk"
_ACCESS = "give a place that may be read and written"
_HINTS = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EROFS: _ACCESS,
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ENOTDIR: "a part of the path is a file; give a folder",
    errno.EISDIR: "give a file",
    errno.EEXIST: "give a new name",
    errno.ELOOP: "the link leads to itself; mend it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the disk or the terminal is gone",
    errno.ENOMEM: "make the model, the batch or the text smaller",
}
"""What to do about the system errors that are nobody's bug."""

_ERROR_NUMBER = re.compile(r"\((?:os )?error (\d+)\)", re.IGNORECASE)  # how Rust libraries report one
_TORCH_DISK = re.compile(r"inline_container\.cc|PytorchStreamWriter")
_TORCH_MEMORY = re.compile(r"can't allocate memory|out of memory|Storage size calculation overflowed")


class UserError(ValueError):
    """Bad input. The command line prints it as one line and exits with code 2."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return "allowed: a, b, c", led by the nearest allowed name if one is close to `given`."""
    allowed = sorted(allowed)
    near = get_close_matches(given, allowed, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}allowed: {', '.join(allowed)}"


def in_a_line(error: BaseException) -> str:
    """Return the reason of a library's exception as one line that fits into a message."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text} is missing" if isinstance(error, KeyError) else text[:300]


def system_fault(error: BaseException) -> str | None:
    """Describe in one line a failure of the disk, the memory or an encoding; return None for any other error.

    Libraries report such failures in different ways, some of them only in words.
    """
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object!r:.100} cannot be written as {error.encoding}; rename what has that name"
    if isinstance(error, UnicodeDecodeError):
        return f"a file or the input holds {error.object[error.start : error.end]!r}, which is not {error.encoding}"
    number = _error_number(error)
    if number not in _HINTS:
        return None
    name = None if _HINTS[number] == _SPACE else getattr(error, "filename", None)
    return f"{f'{name}: ' if isinstance(name, str) else ''}{os.strerror(number)}; {_HINTS[number]}"


def _error_number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _TORCH_MEMORY.search(text)):
        return errno.ENOMEM
    if isinstance(error, RuntimeError) and _TORCH_DISK.search(text):
        named = [number for number in _HINTS if os.strerror(number) in text]
        return named[0] if named else errno.ENOSPC
    found = _ERROR_NUMBER.search(text)
    return int(found[1]) if found else None
