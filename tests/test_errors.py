import errno

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from duollm.errors import UserError, did_you_mean, in_a_line, system_fault


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("token", "did you mean 'tokens'? allowed: compile, tokens"),
        ("complie", "did you mean 'compile'? allowed: compile, tokens"),
        ("zzz", "allowed: compile, tokens"),
    ],
)
def test_the_nearest_name_leads_the_allowed_ones(given, expected):
    assert did_you_mean(given, ["tokens", "compile"]) == expected


def test_user_errors_are_value_errors_for_callers_in_python():
    assert issubclass(UserError, ValueError)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some space"),
        (OSError(errno.EROFS, "Read-only file system", "out/x"), "out/x: Read-only file system; give a place"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out: Permission denied; give a place"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300), "File name too long; give a shorter path"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "file/x"), "file/x: Not a directory"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space"),
        (Exception("Read-only file system (os error 30)"), "Read-only file system"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "No space left"),
        (
            RuntimeError("[... inline_container.cc:747] . open file failed with strerror: Read-only file system"),
            "Read-",
        ),
        (MemoryError(), "Cannot allocate memory; make the model"),
        (UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed"), "'caf\\udce9' cannot be written as"),
        (UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "invalid"), "b'\\xe9', which is not utf-8"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_system_refuses_is_said_in_a_line(error, expected):
    assert expected in system_fault(error)
    assert "\n" not in system_fault(error)


def test_memory_that_libraries_do_not_get_is_no_bug():
    for allocate in (lambda: torch.zeros(10**17), lambda: torch.zeros(10**18, 10**18), lambda: np.zeros(10**17)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        assert "Cannot allocate memory" in system_fault(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        KeyError("x"),
        RuntimeError("size mismatch"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        OSError("in words"),
        Exception("No such file or directory (os error 2)"),
        RecursionError("maximum recursion depth exceeded"),
    ],
)
def test_bugs_stay_bugs(error):
    assert system_fault(error) is None


def test_reasons_fit_into_a_message():
    assert in_a_line(KeyError("splits")) == "'splits' is missing"
    assert in_a_line(ValueError("one\n  two")) == "one two"
    assert in_a_line(EOFError()) == "EOFError"
    assert len(in_a_line(ValueError("x" * 10_000))) <= 300
