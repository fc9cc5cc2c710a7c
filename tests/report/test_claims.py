import csv
import io
import json
import shutil

import pytest

from duollm.analysis.analyse import analyse
from duollm.analysis.results import read_results
from duollm.analysis.verdicts import over_seeds
from duollm.config import Recipe
from duollm.errors import UserError
from duollm.recipe_files import load_recipe, to_yaml
from duollm.report.claims import WIDTH, claims_together, print_claims
from synthetic_run import Plan, write_run


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Two finished runs that differ in the seed."""
    folder, runs = tmp_path_factory.mktemp("claims"), []
    for seed in (0, 1):
        run = folder / f"study-{seed}"
        write_run(run, Plan(seed=seed, documents=8))
        analyse(run, bootstrap_samples=100)
        sizes = {"num_hidden_layers": 6}
        small = {"model": sizes, "router": {"big_layers": [1]}, "ceiling": {"depths": [1]}}
        (run / "config.yaml").write_text(to_yaml(Recipe.model_validate({"seed": seed, **small})))
        runs.append(run)
    return runs


def printed(capsys, runs, domain=None, form="table"):
    print_claims(runs, domain, form)
    return capsys.readouterr().out


def test_a_row_for_every_claim_fits_a_terminal(seeds, capsys):
    shown = printed(capsys, seeds)
    assert max(map(len, shown.splitlines())) <= WIDTH
    for number in range(1, 20):
        assert f"│ C{number} " in shown
    assert "Not measured: it takes a router that may" in shown
    assert "in the contexts shared, committed:" in shown.replace("\n", " ")


def test_every_seed_has_a_verdict_of_its_own(seeds, capsys):
    one, both = (json.loads(printed(capsys, runs, form="json")) for runs in (seeds[:1], seeds))
    assert [len(claim["seeds"]) for claim in (one[2], both[2])] == [1, 2]
    for claim in both:
        assert (claim["verdict"] == "unstable") == (len(set(claim["seeds"])) > 1)
    first, mean = one[2]["estimate"], both[2]["estimate"]
    assert first["value"] != mean["value"]


def test_every_claim_is_decided_by_the_first_study_that_measures_it_in_full(seeds, tmp_path, capsys):
    wide = tmp_path / "wide"
    shutil.copytree(seeds[0], wide)
    recipe = load_recipe(wide / "config.yaml", {"model.hidden_size": "256"})
    (wide / "config.yaml").write_text(to_yaml(recipe))
    results = json.loads((wide / "results.json").read_text())
    for claim in results["claims"]:
        if claim["id"] == "C1":
            claim["conditions"][0]["estimate"] = None
    (wide / "results.json").write_text(json.dumps(results))
    print_claims([wide, *seeds], None, "json")
    shown = capsys.readouterr()
    claims = {claim["id"]: claim for claim in json.loads(shown.out)}
    assert shown.err.startswith(f"note: {seeds[0]} is a study of its own, for model.hidden_size is 128, not 256")
    assert (claims["C1"]["study"], claims["C2"]["study"]) == (str(seeds[0]), str(wide))
    assert [len(claims["C2"]["seeds"]), len(claims["C2"]["other_studies"][str(seeds[0])])] == [1, 2]
    assert "Studies, the one that decides a claim first: A: " in printed(capsys, [wide, *seeds]).replace("\n", " ")


def test_csv_has_a_column_for_every_seed_and_reading(seeds, capsys):
    rows = list(csv.DictReader(io.StringIO(printed(capsys, seeds, form="csv"))))
    assert [row["id"] for row in rows] == [f"C{number}" for number in range(1, 20)]
    assert {"seed 0", "seed 1", "text shared", "drawn shared", "net shared", "text committed"} <= set(rows[0])


def test_one_domain_can_be_asked_for(seeds, capsys):
    claims = json.loads(printed(capsys, seeds[:1], "code", "json"))
    assert {claim["domain"] for claim in claims} == {"code"}
    with pytest.raises(UserError, match="did you mean 'code'"):
        print_claims(seeds, "cod", "table")


def test_a_study_may_lack_the_domain_of_another(seeds, tmp_path, capsys):
    prose = tmp_path / "prose"
    shutil.copytree(seeds[0], prose)
    (prose / "config.yaml").write_text(to_yaml(load_recipe(prose / "config.yaml", {"model.hidden_size": "256"})))
    results = json.loads((prose / "results.json").read_text())
    results["data"] = {"prose": results["data"]["prose"]}
    results["claims"] = [claim for claim in results["claims"] if claim["domain"] == "prose"]
    (prose / "results.json").write_text(json.dumps(results))
    for domain, others in ((None, [str(prose)]), ("code", [])):
        claims = {claim["id"]: claim for claim in json.loads(printed(capsys, [seeds[0], prose], domain, "json"))}
        assert list(claims["C1"]["other_studies"]) == others
    assert claims_together([seeds[0], prose]) == {}


def test_runs_of_one_study_decide_together(seeds):
    together = claims_together(seeds)
    assert set(together) == {"prose", "code", "pooled"}
    for domain, claims in together.items():
        by_seed = [[claim for claim in read_results(run).claims if claim.domain == domain] for run in seeds]
        pairs = [over_seeds(pair) for pair in zip(*by_seed, strict=True)]
        expected = {claim.id: (claim.verdict, claim.estimate) for claim in pairs}
        assert {claim.id for claim in claims} == set(expected)
        own = {claim.id: (claim.verdict, claim.estimate) for claim in claims if claim.domain == domain}
        assert own.items() <= expected.items()
        assert len(own) > 10
    assert claims_together([seeds[0], seeds[0]]) == {}  # one seed twice


def test_a_run_twice_is_told_by_its_name(seeds, capsys):
    rows = list(csv.DictReader(io.StringIO(printed(capsys, [seeds[0], seeds[0]], form="csv"))))
    assert "study-0" in rows[0]


def test_dense_runs_alone_are_refused(tmp_path):
    dense = {"pretrain": {"branch_shares": (0.0, 0.0, 1.0)}}
    (tmp_path / "config.yaml").write_text(to_yaml(Recipe.model_validate(dense)))
    with pytest.raises(UserError, match="only stands beside a study"):
        print_claims([tmp_path], None, "table")
