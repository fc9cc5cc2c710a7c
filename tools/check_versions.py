"""Run one small check (version_check.py) under many versions of transformers, or of torch, and print a table.

Each version is installed by name with pip into a folder of its own, put in front of what is installed, and deleted
again. The versions come from the package index, between the bounds of pyproject.toml.

    python tools/check_versions.py transformers                 # the newest release of each minor version
    python tools/check_versions.py torch 2.6.0 2.14.1           # these; a build for CUDA takes gigabytes
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def lowest(package: str) -> tuple[int, ...]:
    """The lower bound that pyproject.toml sets."""
    for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        if found := re.match(rf"{package}>=([\d.]+)", requirement):
            return as_numbers(found[1])
    raise ValueError(f"pyproject.toml sets no lower bound for {package}")


def as_numbers(release: str) -> tuple[int, ...]:
    """The parts of a version as numbers, which sort."""
    return tuple(int(part) for part in release.split("."))


def newest_of_each_minor(listing: str, bound: tuple[int, ...]) -> list[str]:
    """Pick from what `pip index versions` prints the last release of each minor version from the bound on, in order."""
    available = re.search(r"Available versions: (.*)", listing)
    releases = [each for each in available[1].split(", ") if re.fullmatch(r"[\d.]+", each)] if available else []
    newest = {as_numbers(each)[:2]: each for each in sorted(releases, key=as_numbers) if as_numbers(each) >= bound}
    return list(newest.values())


def check(package: str, release: str, same: list[str]) -> tuple[str, str, str]:
    """Install one release beside the rest and run the check. Return the version, the hash and what went wrong."""
    folder = tempfile.mkdtemp(prefix=f"{package}-{release}-")
    try:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--target", folder]
        installed = subprocess.run([*pip, f"{package}=={release}", *same], capture_output=True, text=True, check=False)
        if installed.returncode:
            return release, "", "not installed: " + installed.stderr.strip().splitlines()[-1]
        paths = [folder, os.environ.get("PYTHONPATH") or str(ROOT / "src")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        run = [sys.executable, str(ROOT / "tools" / "version_check.py")]
        done = subprocess.run(run, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            return release, "", (done.stderr.strip().splitlines() or ["failed"])[-1]
        found = json.loads(done.stdout.splitlines()[-1])
        return found[package], found["hash"], "; ".join(found["warnings"])
    finally:
        shutil.rmtree(folder)


def main() -> int:
    """Print a Markdown table; the exit status is 1 if a version fails or generates anything else."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("package", choices=("transformers", "torch"))
    parser.add_argument("versions", nargs="*", help="default: the newest release of every minor version")
    given = parser.parse_args()
    index = [sys.executable, "-m", "pip", "index", "versions", given.package]
    listing = "" if given.versions else subprocess.run(index, capture_output=True, text=True, check=True).stdout
    versions = given.versions or newest_of_each_minor(listing, lowest(given.package))
    same = [f"numpy=={version('numpy')}"]  # the check draws its weights with it
    print(f"| {given.package} | tokens | problems and warnings |\n|---|---|---|", flush=True)
    hashes = set()
    for each in versions:
        name, digest, problems = check(given.package, each, same)
        hashes.add(digest)
        print(f"| {name} | {digest or '-'} | {problems or 'none'} |", flush=True)
    return 0 if len(hashes) == 1 and "" not in hashes else 1


if __name__ == "__main__":
    sys.exit(main())
