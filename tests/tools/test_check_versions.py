import re
import runpy
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
tool = runpy.run_path(str(ROOT / "tools" / "check_versions.py"))


def test_the_newest_release_of_each_minor_version_from_the_bound_on():
    listing = "Available versions: 5.12.0, 5.11.0rc1, 5.10.4, 5.10.1, 5.9.3, 5.9.0, 4.57.6\n  INSTALLED: 5.9.3"
    assert tool["newest_of_each_minor"](listing, (5, 9, 1)) == ["5.9.3", "5.10.4", "5.12.0"]


def test_the_lowest_constraints_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = project["dependencies"] + [each for extra in ("compat", "data", "dev", "eval") for each in extras[extra]]
    bounds = {
        name.lower(): low for name, low in re.findall(r"^([\w-]+)[>=]=([\d.]+)", "\n".join(required), re.MULTILINE)
    }
    lowest = dict(
        re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints-lowest.txt").read_text().lower(), re.MULTILINE)
    )
    assert bounds.keys() - lowest.keys() <= {"mypy", "ruff"}  # they check the code, not what it runs on
    assert [
        name for name, low in lowest.items() if re.sub(r"(\.0)+$", "", low) != re.sub(r"(\.0)+$", "", bounds[name])
    ] == []
