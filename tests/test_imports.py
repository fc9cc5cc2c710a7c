"""The arrows of docs/architecture.md, and what a source file may hold."""

import ast
import re
import subprocess
from graphlib import TopologicalSorter
from itertools import chain
from pathlib import Path

import pytest

from duollm.config import Recipe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "duollm"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Each part may import those before it, and those of its own rank that do not import it.
RANKS = [
    {"errors", "files", "options", "strict_yaml", "config", "recipe_files", "machine", "ridge", "terminal"},
    {"models"},
    {"routes"},
    {"flops"},
    {"records"},
    {"data"},
    {"measure"},
    {"oracle"},
    {"convert"},
    {"training"},
    {"routers"},
    {"ceiling"},
    {"analysis"},
    {"report"},
    {"saved"},
    {"stages", "study", "checks", "plan", "bench"},
    {"cli"},
    {"__main__"},
]
RANK = {part: rank for rank, parts in enumerate(RANKS) for part in parts}
NO_TORCH = {"errors", "files", "options", "strict_yaml", "config", "recipe_files", "machine", "terminal"}
NO_TORCH |= {"records", "analysis", "report", "stages", "cli"}
HEAVY = {"torch", "transformers"}
HOME_FOLDER = re.compile(r"/(?:home|Users|root)/[A-Za-z0-9_.-]+")


def part_of(path):
    """Name the part of the package a file belongs to: a folder, or a file beside them."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path, everywhere=True):
    """List the absolute names of modules that a file imports; without `everywhere` only those loaded with it."""
    found = []
    nodes = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += imported_from(path, node)
        is_body = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        is_typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if everywhere or not (is_body or is_typing):
            nodes += ast.iter_child_nodes(node)
    return found


def imported_from(path, node):
    if not node.level:
        base = node.module
    else:
        folders = path.relative_to(PACKAGE.parent).parts[: -node.level]
        base = ".".join([*folders, *([node.module] if node.module else [])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def parts_imported(path):
    names = (name.split(".") for name in imports(path))
    return {name[1] for name in names if name[0] == "duollm" and len(name) > 1 and name[1] in RANK}


def modules_of(parts):
    return [path for path in SOURCES if part_of(path) in parts]


def name_of(path):
    return str(path.relative_to(PACKAGE))


def test_every_part_has_a_rank():
    parts = {part_of(path) for path in SOURCES} - {"__init__", "_registration"}
    assert parts <= set(RANK)


@pytest.mark.parametrize("path", modules_of(RANK), ids=name_of)
def test_imports_point_one_way(path):
    wrong = {part for part in parts_imported(path) if RANK[part] > RANK[part_of(path)]}
    assert not wrong, f"{name_of(path)} imports {wrong}, which come after it"


def test_no_parts_import_each_other_however_long_the_way_round():
    arrows = {part: set() for part in RANK}
    for path in modules_of(RANK):
        arrows[part_of(path)] |= parts_imported(path) - {part_of(path)}
    TopologicalSorter(arrows).prepare()


def faults(path):
    """List the texts of a file's errors: what a user is told."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    calls = (node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Error"))
    values = (getattr(node, "value", None) for call in calls for node in ast.walk(call))
    return [value for value in values if isinstance(value, str)]


@pytest.mark.parametrize("path", modules_of(set(RANK) - {"cli", "options"}), ids=name_of)
def test_errors_of_the_library_name_no_flag(path):
    assert not [text for text in faults(path) if re.search(r"(?<!\S)--\w", text)]


@pytest.mark.parametrize(
    "path", modules_of(set(RANK) - {"cli", "config", "recipe_files", "checks", "plan", "study"}), ids=name_of
)
def test_errors_of_the_library_name_no_key_of_a_recipe(path):
    """What takes a whole recipe may; below it an argument has its own name, and `study` or `cli` complete it."""
    keys = [rf"{name}\.{key}\b" for name, field in Recipe.model_fields.items() for key in inner_keys(field)]
    assert not [text for text in faults(path) if re.search("|".join(keys), text)]


def inner_keys(field):
    return getattr(field.annotation, "model_fields", ())


@pytest.mark.parametrize("path", modules_of(NO_TORCH), ids=name_of)
def test_light_parts_load_without_torch(path):
    loaded = {name.split(".")[0] for name in imports(path, everywhere=False)}
    assert not loaded & HEAVY


@pytest.mark.parametrize("path", modules_of({"records", "analysis", "report"}), ids=name_of)
def test_records_analysis_and_report_never_import_torch(path):
    assert not {name.split(".")[0] for name in imports(path)} & HEAVY


@pytest.mark.parametrize("path", modules_of({"models"}), ids=name_of)
def test_models_stand_alone(path):
    """A saved checkpoint may carry its own code: relative imports, inside the folder."""
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    froms = [node for node in tree if isinstance(node, ast.ImportFrom)]
    assert all(node.level <= 1 for node in froms)
    absolute = chain.from_iterable(imported_from(path, node) for node in froms if not node.level)
    assert not [name for name in absolute if name.startswith("duollm")]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_exceeds_500_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_no_tracked_file_names_a_home_folder():
    try:
        listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    tracked = [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]
    assert tracked
    leaks = {str(path) for path in tracked if HOME_FOLDER.search(path.read_bytes().decode("utf-8", "ignore"))}
    assert not leaks


def test_the_home_folder_pattern_finds_them():
    assert HOME_FOLDER.search("open('/" + "home/somebody/data')")
