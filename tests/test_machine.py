import json
import os
import platform
import subprocess
import sys
from io import BytesIO
from urllib.error import HTTPError, URLError

import pytest

from duollm import machine

ON_GLIBC = platform.libc_ver()[0] == "glibc"


def run_with_malloc(code):
    """Run `code`, which has `libc`, `touch(size)` and the functions of the module, in a process of its own."""
    head = """
import ctypes, resource
from pathlib import Path
from duollm.machine import tune_memory, return_freed_memory
assert tune_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def touch(size=32 << 20):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
touch()
"""
    command = [sys.executable, "-c", head + code]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not ON_GLIBC, reason="needs glibc")
def test_freed_memory_is_kept_on_glibc():
    faults = run_with_malloc("""
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(10):
    touch()
print(faults() - before)
""")
    assert faults < 1000  # every fresh 32 MiB would fault 8,192 pages


@pytest.mark.skipif(not ON_GLIBC, reason="needs glibc")
def test_kept_memory_is_returned_when_asked():
    returned = run_with_malloc("""
held = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
touch(256 << 20)
before = held()
return_freed_memory()
print(before - held())
""")
    assert returned > 250 << 20


def test_other_platforms_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert machine.tune_memory() is False
    machine.return_freed_memory()


@pytest.mark.parametrize(("given", "kept"), [(None, "400"), ("7", "7")])
def test_fewer_kernels_are_kept_unless_the_user_says_otherwise(monkeypatch, given, kept):
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    monkeypatch.setattr("platform.libc_ver", lambda: ("none", ""))
    machine.tune_memory()
    assert os.environ[name] == kept


def test_the_peak_is_measured_once_per_process():
    first, shape = machine.best_matmul("fp32", seconds=0.02)
    assert 1e8 < first < 1e16
    assert len(shape) == 3
    assert machine.best_matmul("fp32", seconds=0.02) == (first, shape)


@pytest.mark.parametrize(("fp32", "bf16", "chosen"), [(2.0, 1.0, "fp32"), (1.0, 2.0, "bf16")])
def test_the_faster_precision_wins(monkeypatch, fp32, bf16, chosen):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_matmul_rate", lambda precision, *_: {"fp32": fp32, "bf16": bf16}[precision])
    assert machine.faster_precision.__wrapped__() == chosen


def test_peak_memory_is_in_bytes():
    before = machine.peak_memory_bytes()
    block = bytearray(200_000_000)
    assert before > 1_000_000
    assert machine.peak_memory_bytes() >= len(block)


def test_provenance_says_what_ran_and_where():
    found = machine.provenance(["duollm", "study"], seed=3, data_fingerprint="abc")
    assert found["command"] == ["duollm", "study"]
    assert (found["seed"], found["data_fingerprint"]) == (3, "abc")
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["memory"] > 1_000_000
    assert json.loads(json.dumps(found)) == found


def test_the_commit_is_that_of_the_checkout_of_this_package_only(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "src" / "duollm"
    package.mkdir(parents=True)
    (package / "machine.py").write_text("")
    monkeypatch.setattr(machine, "__file__", str(package / "machine.py"))
    assert machine._commit() is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    assert machine._commit() == git("rev-parse", "HEAD")
    (package / "machine.py").write_text("edited")
    assert machine._commit() == git("rev-parse", "HEAD") + "-dirty"


@pytest.mark.parametrize(
    ("answer", "reached"),
    [
        (None, True),
        (HTTPError("hub", 403, "refused", {}, None), True),
        (URLError("no such host"), False),
        (TimeoutError(), False),
    ],
    ids=["answers", "refuses", "no-host", "timeout"],
)
def test_whether_the_hub_answers(monkeypatch, answer, reached):
    def urlopen(request, timeout):
        if answer is not None:
            raise answer
        return BytesIO()

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert machine.hub_answers() == reached
