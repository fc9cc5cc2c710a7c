"""Writes files under a temporary name and renames them, so that a file that exists is complete."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from duollm.errors import UserError, system_fault

_POINTER = b"version https://git-lfs"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure.

    Works for files and for folders; an existing folder is replaced as a whole.

    Raises:
        UserError: the disk is full or may not be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        yield temporary
        if temporary.is_dir():
            remove(path)
        os.replace(temporary, path)
    except Exception as error:
        fault = None if isinstance(error, UserError) else system_fault(error)
        if fault is None:
            raise
        raise UserError(f"{path} cannot be written: {fault}") from error
    finally:
        with suppress(OSError):
            remove(temporary)


def check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written to, before any work.

    Raises:
        UserError: the message names the option, the folder and the obstacle.
    """
    for place in (folder.absolute(), *folder.absolute().parents):
        try:
            place.lstat()
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                continue
            raise UserError(f"{option} {folder}: {system_fault(error) or error}") from None
        if not place.is_dir():
            raise UserError(f"{option} {folder}: {place} is a file; give a folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"{option} {folder}: {place} may not be written to; give another folder")
        if not shutil.disk_usage(place).free:
            raise UserError(f"{option} {folder}: {place} has no space left; free some, or give another folder")
        return


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_no_pointer(path: Path) -> None:
    """Refuse a file that is only a Git LFS pointer, because the pointer may be read as other content.

    Raises:
        UserError: the message says how to fetch the file.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise UserError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in that folder")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically, UTF-8.

    Characters that UTF-8 cannot encode, such as half a surrogate pair, are written as escapes, which JSON can read.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError, ValueError: it cannot be read, or holds no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("lists are nested too deeply") from None


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` atomically as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fingerprint(value: Any) -> str:
    """Return a short sha256 of a JSON-serialisable value; equal values give equal fingerprints."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
