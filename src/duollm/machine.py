"""The machine of a run: its description, its matmul speed, and its memory settings."""

import ctypes
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from duollm import __version__

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16"]
Shape = tuple[int, int, int]

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4

_KEPT_KERNELS = 400
"""Of 1,024 that oneDNN keeps by default, which are some hundreds of MB (docs/LOG.md)."""

_SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": ((2048, 2048, 2048), (4096, 512, 512)),
    "cuda": ((8192, 8192, 8192), (4096, 4096, 4096)),
}
"""(rows, inner, columns) of matrix products that fill the device."""


def tune_memory() -> bool:
    """Set what the process keeps in memory, before torch is imported.

    glibc keeps freed memory instead of returning it to the system: training frees and takes the same large blocks at
    every step, and faulting their pages in anew costs about a third of the time on CPUs. oneDNN keeps fewer kernels,
    one per shape of a bf16 product: a router gives its branches another number of tokens each time. How OpenMP's
    threads wait is left alone (docs/LOG.md).

    Returns:
        whether freed memory is kept: where there is no glibc, it is not.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(_KEPT_KERNELS))
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 << 20}
    return all([mallopt(name, value) == 1 for name, value in settings.items()])


def return_freed_memory() -> None:
    """Give what `tune_memory` has kept back to the system: what follows takes blocks of other sizes."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def matmul_peak(precision: Precision) -> float:
    """Measure the best rate of matrix products, FLOP/s, on the GPU if there is one; once per process."""
    return best_matmul(precision)[0]


@cache
def best_matmul(precision: Precision, seconds: float = 0.5) -> tuple[float, Shape]:
    """Measure as `matmul_peak`; return the rate and the shape of the fastest product, (rows, inner, columns)."""
    import torch

    shapes = _SHAPES["cuda" if torch.cuda.is_available() else "cpu"]
    return max((_matmul_rate(precision, shape, seconds / len(shapes)), shape) for shape in shapes)


@cache
def faster_precision() -> Precision:
    """Choose the faster of fp32 and bf16: by measuring on a CPU, by what is supported on a GPU."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fp32, bf16 = (_matmul_rate(precision, (1024, 512, 512), 0.1) for precision in ("fp32", "bf16"))
    return "bf16" if bf16 > fp32 else "fp32"


def autocast(device: "torch.device", precision: str) -> "torch.autocast":
    """Return the context in which a forward has this precision: "fp32", "bf16" or "auto", which takes the faster one.

    Weights stay as they are.
    """
    import torch

    precision = faster_precision() if precision == "auto" else precision
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def _matmul_rate(precision: Precision, shape: Shape, seconds: float) -> float:
    """Multiply for about `seconds` and return FLOP/s of the fastest product."""
    import torch

    rows, inner, columns = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(inner, columns, device=device, dtype=dtype)
    durations: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(durations) < 3 or time.perf_counter() < deadline:
        start = time.perf_counter()
        left @ right
        wait_for_gpu()
        durations.append(time.perf_counter() - start)
    return 2 * rows * inner * columns / min(durations)


def wait_for_gpu() -> None:
    """Return when the GPU, if there is one, has done what it was given: it works on while Python goes ahead."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """Return the most memory that this process has held so far (resident set), bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_memory_bytes() -> int:
    """Return the memory of the device that models run on: of the GPU if there is one, else of the machine."""
    import torch

    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else _machine_memory()


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_machine() -> dict[str, Any]:
    """Describe hardware and software, so that a reader can judge a timing. Memory is in bytes."""
    from importlib.metadata import version

    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _machine_memory(),
        "gpus": gpus,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def provenance(command: list[str], seed: int, **details: Any) -> dict[str, Any]:
    """Return where a run's numbers come from, with `details` added, such as the fingerprint of the data."""
    return {
        "version": __version__,
        "commit": _commit(),
        "command": command,
        "seed": seed,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        **details,
    }


def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached, with proxies as the environment sets them."""
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urlopen(Request(hub, method="HEAD"), timeout=5).close()
    except HTTPError:  # an answer too
        return True
    except (OSError, ValueError):
        return False
    return True


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str | None:
    """Return the commit of the checkout this package runs from, "-dirty" if it was edited; else None."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    describe = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
