import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from duollm.analysis.results import analyse, main_context_rows
from duollm.errors import UserError
from synthetic_run import Plan, write_parquet, write_run


@pytest.fixture(scope="module")
def analysed(synthetic, tmp_path_factory):
    run = tmp_path_factory.mktemp("analysed")
    truths = write_run(run)
    return run, truths, analyse(run, bootstrap_samples=300, seed=0)


def _pick(rows, **wanted):
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1
    return found[0]


def test_the_file_holds_what_is_returned_and_is_strict_json(analysed):
    run, _, results = analysed
    text = (run / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == results


def test_nll_rows_equal_the_truth(analysed):
    _, truths, results = analysed
    for domain, truth in truths.items():
        row = _pick(results["nll"], domain=domain, policy="oracle", big_layers=2, context="shared")
        expected = truth.nll_TR[:, truth.space.ids_with(big=2)].min(1).mean()
        assert row["nll"] == pytest.approx(expected)
        assert row["perplexity"] == pytest.approx(np.exp(expected))
        assert row["low"] < row["nll"] < row["high"]
        assert (row["documents"], row["tokens"]) == (12, 240)


def test_gap_closed_equals_its_definition(analysed):
    _, _, results = analysed
    for domain in ("code", "prose", "pooled"):
        nll = {
            policy: _pick(results["nll"], domain=domain, policy=policy, big_layers=3)["nll"]
            for policy in ("static", "oracle", "linear-k3")
        }
        closed = (nll["static"] - nll["linear-k3"]) / (nll["static"] - nll["oracle"])
        assert _pick(results["gap_closed"], domain=domain, big_layers=3)["closed"] == pytest.approx(closed)


def test_gap_closed_at_what_was_spent_equals_its_definition(tmp_path):
    write_run(tmp_path, Plan(overspent_share=0.25, tokens_per_document=200))
    results = analyse(tmp_path, 100)
    row = _pick(results["gap_closed"], domain="prose", big_layers=3)
    share = row["mean_big_layers"] - 3
    assert 0.2 < share < 0.3

    def at(policy, k):
        return _pick(results["nll"], domain="prose", policy=policy, big_layers=k)["nll"]

    static, oracle = ((1 - share) * at(policy, 3) + share * at(policy, 4) for policy in ("static", "oracle"))
    assert row["closed_at_spent"] == pytest.approx((static - at("linear-k3", 3)) / (static - oracle))
    assert row["closed_at_spent_low"] < row["closed_at_spent"] < row["closed_at_spent_high"]
    assert row["closed_at_spent"] < row["closed"]


def test_gap_closed_at_what_was_spent_needs_the_neighbouring_budgets(tmp_path):
    write_run(tmp_path, Plan(overspent_share=0.25, tokens_per_document=200, router_budgets=(2, 3)))
    for domain in ("prose", "code"):
        path = tmp_path / "oracle" / f"{domain}.parquet"
        facts = json.loads(pq.read_schema(path).metadata[b"duollm"]) | {"big_layers": [0, 2, 3, 6]}
        table = pq.read_table(path)
        write_parquet(path, {name: table.column(name) for name in table.column_names}, facts)
    rows = analyse(tmp_path, 100)["gap_closed"]
    assert _pick(rows, domain="pooled", big_layers=2)["closed_at_spent"] is not None
    assert _pick(rows, domain="pooled", big_layers=3)["closed_at_spent"] is None
    assert _pick(rows, domain="pooled", big_layers=3)["closed"] is not None


def test_files_without_the_newer_measures_are_analysed_without_them(tmp_path):
    write_run(tmp_path, Plan(measures=False))
    results = analyse(tmp_path, 100)
    assert results["selection_noise"] == []
    assert {row["context"] for row in results["nll"]} == {None, "shared"}
    assert not any(row["policy"] == "executed-together" for row in results["nll"])
    assert _pick(results["claims"], id="C5", domain="pooled")["estimate"] is None


def test_only_the_main_context_speaks_for_the_oracle(analysed):
    _, _, results = analysed
    rows = [row for row in main_context_rows(results) if row["policy"] in ("oracle", "executed-together")]
    assert {row["context"] for row in rows} == {"shared"}
    assert len(rows) == 2 * 3 * 7
    assert len(results["nll"]) == len(main_context_rows(results)) + 2 * 3


def test_best_of_curve_falls_from_random_to_static(analysed):
    _, _, results = analysed
    curve = _pick(results["best_of_patterns"], domain="code", big_layers=3)
    assert curve["patterns"] == 20
    assert (curve["drawn"][0], curve["drawn"][-1]) == (1, 100)
    for index, policy in ((0, "random-patterns"), (-1, "static")):
        row = _pick(results["nll"], domain="code", policy=policy, big_layers=3)
        assert curve["nll"][index] == pytest.approx(row["nll"])


def test_differences_from_all_big_are_paired(tmp_path):
    """Documents differ by tenths of a nat, but the policies on them move together."""
    write_run(tmp_path, Plan(noise=0.05))
    results = analyse(tmp_path, 300)
    big = _pick(results["nll"], domain="prose", policy="all-big")
    for row in results["nll"]:
        if row["domain"] == "prose":
            assert row["over_all_big"] == pytest.approx(row["nll"] - big["nll"], abs=1e-12)
    oracle = _pick(results["nll"], domain="prose", policy="oracle", big_layers=3)
    assert oracle["over_all_big_high"] - oracle["over_all_big_low"] < 0.5 * (oracle["high"] - oracle["low"])


def test_patterns_on_a_sample_are_compared_on_all_tokens(tmp_path):
    """What was run on a quarter of the tokens stands beside what was run on all, within its interval."""
    write_run(tmp_path / "all", Plan(documents=30))
    write_run(tmp_path / "sample", Plan(documents=30, counted_share=0.25))
    exact, estimated = (analyse(tmp_path / name, 300) for name in ("all", "sample"))
    assert estimated["data"]["prose"] == {"documents": 30, "tokens": 600, "pattern_tokens": 150}
    for k in (1, 3, 5):
        wanted = _pick(exact["nll"], domain="pooled", policy="random-patterns", big_layers=k)
        found = _pick(estimated["nll"], domain="pooled", policy="random-patterns", big_layers=k)
        assert found["nll"] == pytest.approx(wanted["nll"], abs=0.02)
        assert found["over_all_big_low"] < wanted["over_all_big"] < found["over_all_big_high"]


def test_layer_use_equals_the_truth(analysed):
    _, truths, results = analysed
    truth = truths["prose"]
    row = _pick(results["layer_use"], domain="prose", policy="linear-k2")
    is_big_TL = truth.space.decode(truth.router_route_T[2]) == 2
    np.testing.assert_allclose(row["share_by_layer"], is_big_TL.mean(0))
    assert np.shape(row["share_by_layer_and_position"]) == (6, 8)


def test_planted_effects_are_found(analysed):
    """Noise per route makes the middle best for the oracle; late layers gain more, so they are big more often."""
    _, _, results = analysed
    verdicts = {(claim["id"], claim["domain"]): claim["verdict"] for claim in results["claims"]}
    assert verdicts["C2", "pooled"] == "reproduced"
    assert verdicts["C6", "pooled"] == "reproduced"
    assert verdicts["C8", "pooled"] == "not reproduced"
    assert {domain for _, domain in verdicts} == {"code", "prose", "pooled"}


def test_more_documents_give_narrower_intervals(tmp_path):
    widths = []
    for documents in (6, 60):
        run = tmp_path / str(documents)
        write_run(run, Plan(documents=documents, router_budgets=()))
        row = _pick(analyse(run, 300)["nll"], domain="pooled", policy="all-big")
        widths.append(row["high"] - row["low"])
    assert widths[1] < 0.6 * widths[0]


def test_one_domain_without_routers(own_run):
    for path in (own_run / "oracle").glob("code*"):
        path.unlink()
    for path in (own_run / "evaluate").glob("*/*.parquet"):
        path.unlink()
    results = analyse(own_run, 100)
    assert list(results["data"]) == ["prose"]
    assert {row["domain"] for row in results["nll"]} == {"prose"}
    assert results["gap_closed"] == []
    assert _pick(results["claims"], id="C1")["verdict"] == "undecided"


def test_same_seed_same_numbers(own_run):
    assert analyse(own_run, 100, seed=3) == analyse(own_run, 100, seed=3)


def test_a_run_without_provenance(own_run):
    (own_run / "provenance.json").unlink()
    with pytest.raises(UserError, match=r"provenance\.json: no such file; is .* a run folder"):
        analyse(own_run, 100)


def test_domains_of_different_models_do_not_mix(own_run, tmp_path):
    other = tmp_path / "other"
    write_run(other, Plan(num_layers=4, router_budgets=()))
    for name in ("code.parquet", "code.routes.parquet"):
        (other / "oracle" / name).rename(own_run / "oracle" / name)
    for path in (own_run / "evaluate").glob("*/code.parquet"):
        path.unlink()
    with pytest.raises(UserError, match="its model or context is not that of"):
        analyse(own_run, 100)


def test_parameters_are_counted_from_the_weights(own_run):
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file({"a": np.zeros((3, 4)), "b": np.zeros(5)}, own_run / "model" / "model.safetensors")
    assert analyse(own_run, 100)["model"]["parameters"] == 17


def test_no_torch():
    code = (
        "import sys; from pathlib import Path; from duollm.analysis.results import analyse; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
