"""`./run reference` on tiny models: every command of it, and the claims that it decides."""

import json

import pytest
import yaml

import decide_claims
from duollm import cli
from duollm.flops import mean_token_flops
from duollm.plan import planned_config
from duollm.recipe_files import load_recipe
from tiny import SIZES
from tiny_corpus import write_corpus

pytestmark = pytest.mark.usefixtures("quick_machine")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """A folder with the recipes of a tiny reference study and of a smaller one."""
    folder = tmp_path_factory.mktemp("tiny")
    texts = [str(write_corpus(folder / name, documents=20, seed=seed)) for seed, name in enumerate(["owls", "cats"])]
    sizes = {"hidden_size", "num_hidden_layers", "intermediate_size", "small_intermediate_size"}
    values = {
        "name": "tiny",
        "model": {key: SIZES[key] for key in sizes},
        "data": {"domains": texts, "vocab_size": 300, "sequence_length": 16, "test_share": 0.3},
        "pretrain": {"tokens": 600, "batch_size": 8, "precision": "fp32", "compile": False},
        "oracle": {"documents": 4, "random_routes": 2},
        "router": {"kinds": ["linear"], "big_layers": [1, 2], "tokens": 200, "precision": "fp32"},
        "ceiling": {"enabled": False},
        "report": {"bootstrap_samples": 100, "shown_documents": 1},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(values))
    longer = values | {"pretrain": values["pretrain"] | {"tokens": 700}}
    (folder / "reference.yaml").write_text(yaml.safe_dump(longer))
    return folder


def write_no_figures(run, shown_documents, missing=(), figures=True):
    """Figures are tested elsewhere, and take most of the time of a tiny study."""
    (run / "figures").mkdir(exist_ok=True)
    (run / "report.html").write_text("a page")


@pytest.fixture
def commands(monkeypatch):
    """Run commands in this process, and return their verbs and first options."""
    called = []

    def call(arguments):
        called.append(list(arguments))
        assert cli.main(list(arguments)) == 0

    monkeypatch.setattr(decide_claims, "duollm", call)
    monkeypatch.setattr("duollm.study.write_report", write_no_figures)
    return called


def test_dense_models_take_the_flops_of_the_duo():
    recipe = load_recipe(decide_claims.RECIPES / "quick.yaml")
    widths = decide_claims.dense_widths(recipe)
    assert widths == {0.0: 32, 0.25: 152, 0.5: 272, 0.75: 392, 1.0: 512}
    for share, width in widths.items():
        dense = recipe.model_copy(update={"model": recipe.model.model_copy(update={"intermediate_size": width})})
        expected = mean_token_flops(planned_config(recipe), (0, 1 - share, share), recipe.data.sequence_length)
        assert mean_token_flops(planned_config(dense), (0, 0, 1), recipe.data.sequence_length) == expected


def test_commands_are_printed_and_no_more(capsys, tmp_path, commands):
    decide_claims.main(["--out", str(tmp_path), "--reference", "runs/a", "--dry-run", "--skip-on-study"])
    lines = capsys.readouterr().out.splitlines()
    assert not commands
    assert not list(tmp_path.iterdir())
    assert sum(line.startswith("duollm study") for line in lines) == 3 * 7
    assert sum(line.startswith("duollm pretrain") for line in lines) == 3 * 7
    [claims] = [line for line in lines if line.startswith("duollm claims runs/a ")]
    assert claims.count("/small-1/") == 13
    layers = next(line for line in lines if "skip-layers" in line)
    assert "--model.skip_scope layer" in layers
    assert "--model.path" not in layers  # a saved model has a scope of its own
    assert f"--model.path {tmp_path}/small-0/study/model" in next(line for line in lines if "/skip-small " in line)


@pytest.mark.slow
def test_the_script_decides_every_claim_and_does_nothing_twice(recipes, tmp_path, commands, capsys):
    given = [
        "--out",
        str(tmp_path),
        "--recipe",
        str(recipes / "reference.yaml"),
        "--small",
        str(recipes / "small.yaml"),
        "--seeds",
        "3",
    ]
    given += ["--task-documents", "4"]
    decide_claims.main(given)
    claims = {claim["id"]: claim for claim in json.loads((tmp_path / "claims.json").read_text())}
    assert list(claims) == [f"C{number}" for number in range(1, 20)]
    unmeasured = {name for name, claim in claims.items() if claim["verdict"] == "not measured"}
    assert unmeasured == {"C5", "C12", "C18", "C19"}  # the tiny recipe has neither ramps, nor Python, nor these routers
    decided_by = {name: claim["study"].rpartition("tmp")[-1] for name, claim in claims.items()}
    assert [name for name, study in decided_by.items() if study.endswith("small-3/study")] == [
        *["C9", "C10", "C13", "C14", "C15", "C16", "C17"]  # each takes runs beside a study
    ]
    for claim in claims.values():
        missing = [one["quantity"] for one in claim["conditions"] if not one["estimate"]]
        assert claim["id"] in unmeasured or not missing
    assert (tmp_path / "claims.csv").exists()
    assert (tmp_path / "comparison.html").exists()
    assert (tmp_path / "duo_and_dense.svg").exists()
    scored = [call for call in commands if call[0] == "score"]
    commands.clear()
    decide_claims.main(given)
    assert scored
    assert {call[0] for call in commands} == {"study", "pretrain", "report"}
