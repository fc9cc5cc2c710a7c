import errno
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import duollm
from duollm import cli
from duollm.config import Recipe
from duollm.errors import UserError
from duollm.recipe_files import DEFAULT_RECIPE, find_recipe, load_recipe

STUDY_VERBS = {
    "study": "report",
    "pretrain": "pretrain",
    "oracle": "oracle",
    "train-router": "train-router",
    "evaluate": "evaluate",
}


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Stand in for the work: records what the command line asks for."""
    calls = []
    module = ModuleType("duollm.study")
    module.run_study = lambda *arguments: calls.append(arguments)
    monkeypatch.setitem(sys.modules, "duollm.study", module)
    monkeypatch.setattr("duollm.cli.tune_memory", lambda: True)
    monkeypatch.chdir(tmp_path)
    return calls


def refusal(capsys, *arguments):
    """Run a command that must fail and return its one line."""
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("duollm: error: ")
    return output.err


def python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in cli.VERBS)])
def test_help_is_light(arguments):
    code = "import sys\nfrom duollm.cli import main\nmain(sys.argv[1:])\nprint('MODULES', *sys.modules)"
    modules = python(code, *arguments).partition("MODULES")[2].split()
    assert not {"torch", "transformers", "matplotlib", "pyarrow", "numpy"} & set(modules)


@pytest.mark.parametrize(("arguments", "limit"), [(["--help"], 0.3), (["study", "--help"], 0.5)])
def test_help_takes_a_fraction_of_a_second(arguments, limit):
    def seconds():
        """Of the processor: what else this machine does makes the command wait, not work."""
        before = os.times()
        python("import sys\nfrom duollm.cli import main\nmain(sys.argv[1:])", *arguments)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(seconds() for _ in range(5)) < limit


def test_the_overview_names_every_verb(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in cli.VERBS)


def test_the_help_of_a_verb_describes_every_recipe_key(capsys):
    assert cli.main(["study", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, field in Recipe.model_fields.items():
        for key, inner in getattr(field.annotation, "model_fields", {}).items():
            assert f"--{name}.{key} " in shown
            assert " ".join(inner.description.split()) in shown
    assert "auto|fp32|bf16" in shown
    assert "(default: [2, 4, 6, 8, 10])" in shown


@pytest.mark.parametrize(("verb", "until"), STUDY_VERBS.items())
def test_verbs_run_the_study_up_to_their_stage(study, tmp_path, verb, until):
    assert cli.main([verb, "--out", str(tmp_path / "run")]) == 0
    [(recipe, run, command, asked)] = study
    assert recipe == load_recipe(find_recipe(DEFAULT_RECIPE))
    assert run == tmp_path / "run"
    assert command == ["duollm", verb, "--out", str(tmp_path / "run")]
    assert asked == until


def test_the_run_folder_is_named_after_the_recipe(study):
    cli.main(["study", "--name", "mine"])
    assert study[0][1].parts == ("runs", "mine")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pretrain.tokens", "5e5", "recipe.yaml", "--router.big_layers=[2,4]"],
        ["recipe.yaml", "--pretrain.tokens=5e5", "--router.big_layers", "[2,4]"],
    ],
)
def test_overrides_come_in_both_spellings_and_any_order(study, tmp_path, arguments):
    (tmp_path / "recipe.yaml").write_text("seed: 9\npretrain: {tokens: 7}\n")
    assert cli.main(["study", *arguments]) == 0
    recipe = study[0][0]
    assert (recipe.seed, recipe.pretrain.tokens, recipe.router.big_layers) == (9, 500_000, [2, 4])


def test_a_dry_run_prints_the_resolved_recipe_and_does_nothing(study, capsys, tmp_path):
    assert cli.main(["study", "--dry-run", "--pretrain.learning_rate", "3e-4"]) == 0
    shown = Recipe.model_validate(yaml.safe_load(capsys.readouterr().out))
    assert shown.pretrain.learning_rate == 3e-4
    assert shown.oracle == load_recipe(find_recipe(DEFAULT_RECIPE)).oracle
    assert study == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "fault"),
    [
        ("router.big_layers", "[99]", "router.big_layers holds 99; this model has 12 layers"),
        ("data.sequence_length", "4096", "must not exceed the 2048 positions of this model"),
    ],
)
def test_a_dry_run_refuses_what_the_recipes_model_does_not_allow(study, capsys, key, value, fault):
    assert cli.main(["study", "--dry-run", f"--{key}", value]) == 2
    said = capsys.readouterr()
    assert fault in said.err
    assert (said.out, study) == ("", [])


def test_plan_prints_the_numbers(capsys):
    assert cli.main(["plan", "paper"]) == 0
    shown = capsys.readouterr().out
    assert "1.40 B" in shown
    assert "944 M" in shown


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["studdy"], "did you mean 'study'?"),
        (["study", "--pretrain.token", "5"], "did you mean --pretrain.tokens?"),
        (["study", "--pretrain.token=5"], "did you mean --pretrain.tokens?"),
        (["study", "--sequence_length", "5"], "did you mean --data.sequence_length?"),
        (["study", "--pretrain.tok", "5"], "unknown option --pretrain.tok;"),
        (["study", "--dryrun"], "did you mean --dry-run?"),
        (["study", "--pretrain.tokens"], "expected one argument"),
        (["study", "--pretrain.tokens", "many"], "--pretrain.tokens: "),
        (["study", "quick", "again"], "got 'again'"),
        (["study", "quik"], "did you mean 'quick'?"),
        (["bench", "everything"], "'train'"),
        (["bench", "train", "--precision", "bf16"], "goes with 'bench forward' only, got 'bench train'"),
        (["bench", "forward", "--seconds", "nan"], "takes a number from 0.01 to 3600, got 'nan'"),
        (["study", "--model.path", ""], "--model.path: an empty value was given"),
        (["study", "--data.tokenizer="], "--data.tokenizer: an empty value was given"),
        (["study", "--out", ""], "--out: an empty value was given"),
        (["study", ""], "RECIPE: an empty value was given"),
        (["compare", ""], "RUN: an empty value was given"),
        (["study", "--seed", "99999999999999999999"], "--seed: "),
        (["study", "--out", "x" * 300], "File name too long"),
        (["study", "x" * 300], "File name too long"),
        (["study", "--name", "a\nb", "--out", "\udcff"], r"b'\xff' is not UTF-8"),
        (["study", "no\nsuch"], "no such: no such recipe"),
    ],
)
def test_mistakes_get_one_line_with_the_way_out(study, capsys, arguments, expected):
    assert expected in refusal(capsys, *arguments)
    assert study == []


@pytest.mark.parametrize("out", ["taken", "taken/run"])
def test_a_file_is_no_run_folder(study, capsys, tmp_path, out):
    (tmp_path / "taken").write_text("mine")
    assert "is a file" in refusal(capsys, "study", "--out", out)
    assert study == []


def test_somebody_elses_folder_is_not_written_to(study, capsys, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").touch()
    assert "no run folder" in refusal(capsys, "study", "--out", "thesis")
    assert study == []


@pytest.mark.parametrize("files", [[], ["config.yaml", "results.json"]])
def test_empty_folders_and_run_folders_are_welcome(study, tmp_path, files):
    (tmp_path / "run").mkdir()
    for name in files:
        (tmp_path / "run" / name).touch()
    assert cli.main(["study", "--out", "run"]) == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no such text"), 2),
        (UserError("two\nlines"), 2),
        (OSError(errno.ENOSPC, "No space left on device"), 2),
        (OSError(errno.EROFS, "Read-only file system", "x"), 2),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), 2),
        (MemoryError(), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_user_mistakes_and_interrupts_end_in_one_line(study, monkeypatch, capsys, error, code):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(sys.modules["duollm.study"], "run_study", fail)
    assert cli.main(["study"]) == code
    assert capsys.readouterr().err.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_error():
    command = f'{sys.executable} -c \'import sys, duollm.cli; sys.exit(duollm.cli.main(["study", "--help"]))\' | true'
    assert subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stderr == ""


def shell(line, **environment):
    """Run a line of bash in which $DUOLLM is the command; return its exit code and what it said on stderr."""
    duollm = f"{sys.executable} -c 'import sys, duollm.cli; sys.exit(duollm.cli.main())'"
    done = subprocess.run(
        ["bash", "-c", line.replace("DUOLLM", duollm)], capture_output=True, env=os.environ | environment
    )
    return done.returncode, done.stderr.decode(), done.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("DUOLLM study --dry-run >&-", "standard output is closed; redirect it"),
        ("DUOLLM study --dry-run >/dev/full", "No space left on device"),
        ("DUOLLM study --help >/dev/full", "No space left on device"),
        ("DUOLLM --version >/dev/full", "No space left on device"),
    ],
)
def test_output_that_goes_nowhere_is_said_in_a_line(line, expected):
    code, said, _ = shell(line)
    assert code == 2
    assert said.count("\n") == 1
    assert expected in said


def test_installed_packages_that_no_verb_uses_say_nothing():
    """torchao, which transformers imports where it is installed, complains on machines without its GPUs."""
    assert shell("DUOLLM generate nowhere x")[1].count("\n") == 1


def test_closed_streams_do_no_harm():
    assert shell("DUOLLM study nope 2>&- <&-")[0] == 2
    assert shell("DUOLLM study --dry-run 2>&- <&-")[0] == 0


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_a_terminal_cannot_show_is_replaced(encoding):
    code, said, shown = shell("DUOLLM study --dry-run --name 'Größe 東'", PYTHONIOENCODING=encoding, PYTHONUTF8="1")
    assert (code, said) == (0, "")
    assert "name: Größe 東".encode(encoding, "replace") in shown


def test_our_own_mistakes_keep_their_traceback(study, monkeypatch):
    monkeypatch.setattr(sys.modules["duollm.study"], "run_study", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["study"])


def test_how_threads_wait_is_left_alone(study, monkeypatch):
    """Waiting passively costs a process that has its cores to itself a third of its speed."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    cli.main(["study"])
    assert "OMP_WAIT_POLICY" not in os.environ


def test_bench_passes_its_options_on(monkeypatch):
    asked = []
    module = ModuleType("duollm.bench")
    module.run_bench = lambda *arguments: asked.append(arguments)
    monkeypatch.setitem(sys.modules, "duollm.bench", module)
    monkeypatch.setattr("duollm.cli.tune_memory", lambda: True)
    assert cli.main(["bench", "oracle", "--seconds", "2", "--json"]) == 0
    assert asked == [("oracle", 2.0, "fp32", True)]


def test_the_version_needs_no_installed_metadata():
    """In a source tree on the path, without the metadata of an installation."""
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from duollm.cli import main; sys.exit(main(['--version']))"
    source = str(Path(duollm.__file__).parents[1])
    shown = subprocess.run([sys.executable, "-S", "-c", code, source], capture_output=True, text=True, check=True)
    assert shown.stdout == f"duollm {duollm.__version__}\n"
