"""Run transformers' own model tests against the duo, beside Llama, and compare.

The tests come from the source distribution of the installed transformers, which pip fetches by name into a cache
folder. Nothing of them is part of this repository. That distribution holds no generation and no export tests; a
checkout of transformers has them and can be given with `--source`. Needs the extra `compat`.

    python tools/transformers_suite.py                                  # all four classes
    python tools/transformers_suite.py --class duo --only save_load     # one class, tests whose name contains this
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

CLASSES = {"llama": "TestLlama", "duo": "TestDuo", "duo-mixed": "TestDuoMixed", "duo-layer": "TestDuoLayer"}

_DUO = {
    "test_bc_cache_name_forward": "since 5.24 wants a warning for past_key_values; the duo takes both names without",
}
EXPECTED: dict[str, dict[str, str]] = {"duo": _DUO, "duo-mixed": _DUO, "duo-layer": _DUO}
"""Tests that pass on Llama and may fail on the duo: per class, test -> reason. docs/compatibility.md has the same."""

# Modules that the mixins import and the source distribution lacks.
_STUBS = {
    "__init__.py": "",
    "distributed_testing_utils.py": "def __getattr__(name):\n    return lambda: 'cpu'\n",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = "
    "{'return_dict': False, 'output_hidden_states': True, 'output_attentions': True, 'dtype': 'float16', "
    "'chunk_size_feed_forward': 5, 'architectures': ['Some'], 'problem_type': 'regression', "
    "'is_encoder_decoder': False, 'id2label': {0: 'label'}, 'label2id': {'label': '0'}, 'name_or_path': 'name'}\n",
}


def fetch(cache: Path) -> Path:
    """Return the unpacked source distribution of the installed transformers; fetch it with pip the first time."""
    release = f"transformers-{version('transformers')}"
    folder = cache / release
    if not folder.is_dir():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*pip, "--dest", str(cache), release.replace("-", "==")], check=True)
        with tarfile.open(cache / f"{release}.tar.gz") as archive:
            archive.extractall(cache / "unpacked", filter="data")
        (cache / "unpacked" / release).rename(folder)
    return folder


def as_package(source: Path, cache: Path) -> Path:
    """Make the folder from which `transformers_tests` is imported: links to the source's tests, and stubs."""
    home = cache / f"package-{source.name}"
    package = home / "transformers_tests"
    (home / "stub" / "reports").mkdir(parents=True, exist_ok=True)
    (home / "stub" / "reports" / "tiny_model_summary.json").write_text("{}")
    for folder in ("", "exporters", "generation", "utils"):
        (package / folder).mkdir(parents=True, exist_ok=True)
        (package / folder / "__init__.py").touch()
    for file in (source / "tests").rglob("*.py"):
        name = file.relative_to(source / "tests")
        if len(name.parts) == 1 or name.parent.name in ("exporters", "generation", "utils"):
            (package / name).write_bytes(file.read_bytes())
    for name, text in _STUBS.items():
        if not (package / name).exists():
            (package / name).write_text(text)
    if not (home / "src").exists():
        (home / "src").symlink_to(source / "src")
    return home


class Results:
    """Pytest plugin that keeps each test's outcome: `outcomes[class][test]` is (outcome, first line of the reason)."""

    def __init__(self) -> None:
        self.outcomes: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for each phase and subtest: the worst outcome of a test counts."""
        _, kind, test = report.nodeid.split("::")
        tests = self.outcomes[kind]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            tests[test] = ("failed", (crash.message if crash else str(report.longrepr)).split("\n")[0])
        elif report.skipped and tests.get(test, ("",))[0] != "failed":
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            tests[test] = ("skipped", reason.removeprefix("Skipped: "))
        elif report.when == "call" and (
            test not in tests or (hasattr(report, "context") and tests[test][0] == "skipped")
        ):
            tests[test] = (
                "passed",
                "",
            )  # of a test's subtests (they have a context) one that passes outweighs a skipped one


def run(home: Path, classes: list[str], only: str | None) -> dict[str, dict[str, tuple[str, str]]]:
    """Run the classes' tests and return what became of each."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "RUN_SLOW": "1", "TRANSFORMERS_TINY_MODEL_PATH": str(home / "stub")}
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    sys.path[:0] = [str(home)]
    chosen = " or ".join(CLASSES[name] + "Case" for name in classes)
    arguments = [
        str(Path(__file__).with_name("transformers_cases.py")),
        "-k",
        f"({chosen})" + (f" and {only}" if only else ""),
    ]
    # Not `-W ignore`: some tests count warnings.
    quiet = ["-q", "--no-header", "--no-summary", "--tb=no", "--disable-warnings", "-p", "no:cacheprovider"]
    results = Results()
    pytest.main([*arguments, *quiet, "-c", os.devnull, "--rootdir", str(home)], plugins=[results])
    return results.outcomes


def show(outcomes: dict[str, dict[str, tuple[str, str]]], classes: list[str]) -> int:
    """Print the counts, then each difference from Llama; return how many of them nothing explains."""
    print("| class | passed | failed | of these explained | skipped |\n|---|---|---|---|---|")
    llama = outcomes[CLASSES["llama"] + "Case"]
    unexplained, lines = 0, []
    for name in classes:
        tests, expected = outcomes[CLASSES[name] + "Case"], EXPECTED.get(name, {})
        count = Counter(outcome for outcome, _ in tests.values())
        worse = {
            test: why
            for test, (outcome, why) in tests.items()
            if outcome == "failed" and (name == "llama" or llama[test][0] != "failed")
        }
        print(
            f"| {name} | {count['passed']} | {count['failed']} | {len(worse.keys() & expected)} | {count['skipped']} |"
        )
        unexplained += len(worse.keys() - expected)
        skipped = {
            test: why for test, (outcome, why) in tests.items() if outcome == "skipped" and llama[test][0] == "passed"
        }
        why_failed = {test: expected.get(test) or f"UNEXPLAINED: {why}" for test, why in worse.items()}
        lines += grouped(f"{name}: failed", why_failed) + grouped(f"{name}: skipped", skipped)
    print(
        "\nPassed on Llama, not on the duo:" if lines else "\nWhat passes on Llama passes on the duo.", *lines, sep="\n"
    )
    return unexplained


def grouped(what: str, reasons: dict[str, str]) -> list[str]:
    """One line for all tests with the same reason."""
    tests_of: dict[str, list[str]] = defaultdict(list)
    for test, reason in reasons.items():
        tests_of[reason].append(test)
    return [
        f"- {what}: {tests[0]}{f' and {len(tests) - 1} more' if len(tests) > 1 else ''}: {reason}"
        for reason, tests in tests_of.items()
    ]


def main() -> int:
    """Fetch, run, compare; the exit status is 1 if a difference from Llama is not explained."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--class", dest="classes", action="append", choices=CLASSES, help="default: all; Llama always runs"
    )
    parser.add_argument("--only", help="run only tests whose name contains this (a pytest -k expression)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "duollm", help="where sources are kept")
    parser.add_argument("--source", type=Path, help="a checkout of transformers, in place of the source distribution")
    given = parser.parse_args()
    if importlib.util.find_spec("parameterized") is None:
        parser.error(
            "transformers' tests need the package parameterized; install the extra: pip install -e '.[compat]'"
        )
    given.cache.mkdir(parents=True, exist_ok=True)
    home = as_package(given.source or fetch(given.cache), given.cache)
    classes = [name for name in CLASSES if name == "llama" or name in (given.classes or CLASSES)]
    outcomes = run(home, classes, given.only)
    return 1 if not outcomes or show(outcomes, classes) else 0


if __name__ == "__main__":
    sys.exit(main())
