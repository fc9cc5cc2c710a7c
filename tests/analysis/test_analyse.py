import json
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from duollm.analysis.analyse import analyse
from duollm.analysis.results import Size, read_results
from duollm.errors import UserError
from picking import pick
from synthetic_run import Plan, write_parquet, write_run


@pytest.fixture(scope="module")
def analysed(synthetic, tmp_path_factory):
    run = tmp_path_factory.mktemp("analysed")
    truths = write_run(run)
    return run, truths, analyse(run, bootstrap_samples=300, seed=0)


def _width(estimate):
    return estimate.high - estimate.low


def test_the_file_holds_what_is_returned_and_is_strict_json(analysed):
    run, _, results = analysed
    json.loads((run / "results.json").read_text(), parse_constant=pytest.fail)
    assert read_results(run) == results


def test_nll_rows_equal_the_truth(analysed):
    _, truths, results = analysed
    for domain, truth in truths.items():
        row = pick(results.nll, domain=domain, policy="oracle", big_layers=2, context="shared")
        expected = truth.nll_TR[:, truth.space.ids_with(big=2)].min(1).mean()
        assert row.nll.value == pytest.approx(expected)
        assert row.perplexity == pytest.approx(np.exp(expected))
        assert row.nll.low < row.nll.value < row.nll.high
        assert (row.documents, row.tokens) == (12, 240)


def test_gap_closed_equals_its_definition(analysed):
    _, _, results = analysed
    for domain in ("code", "prose", "pooled"):
        nll = {
            policy: pick(results.nll, domain=domain, policy=policy, big_layers=3).nll.value
            for policy in ("static", "oracle", "linear-k3")
        }
        closed = (nll["static"] - nll["linear-k3"]) / (nll["static"] - nll["oracle"])
        assert pick(results.gap_closed, domain=domain, big_layers=3).closed.value == pytest.approx(closed)


def test_gap_closed_at_what_was_spent_equals_its_definition(tmp_path):
    write_run(tmp_path, Plan(overspent_share=0.25, tokens_per_document=200))
    results = analyse(tmp_path, 100)
    row = pick(results.gap_closed, domain="prose", big_layers=3)
    share = row.mean_big_layers - 3
    assert 0.2 < share < 0.3

    def at(policy, k):
        return pick(results.nll, domain="prose", policy=policy, big_layers=k).nll.value

    static, oracle = ((1 - share) * at(policy, 3) + share * at(policy, 4) for policy in ("static", "oracle"))
    assert row.closed_at_spent.value == pytest.approx((static - at("linear-k3", 3)) / (static - oracle))
    assert row.closed_at_spent.low < row.closed_at_spent.value < row.closed_at_spent.high
    assert row.closed_at_spent.value < row.closed.value


def test_gap_closed_at_what_was_spent_needs_the_neighbouring_budgets(tmp_path):
    write_run(tmp_path, Plan(overspent_share=0.25, tokens_per_document=200, router_budgets=(2, 3)))
    for domain in ("prose", "code"):
        path = tmp_path / "oracle" / f"{domain}.parquet"
        facts = json.loads(pq.read_schema(path).metadata[b"duollm"]) | {"big_layers": [0, 2, 3, 6]}
        table = pq.read_table(path)
        write_parquet(path, {name: table.column(name) for name in table.column_names}, facts)
    rows = analyse(tmp_path, 100).gap_closed
    assert pick(rows, domain="pooled", big_layers=2).closed_at_spent is not None
    assert pick(rows, domain="pooled", big_layers=3).closed_at_spent is None
    assert pick(rows, domain="pooled", big_layers=3).closed is not None


def test_files_without_the_newer_measures_are_analysed_without_them(tmp_path):
    write_run(tmp_path, Plan(measures=False))
    results = analyse(tmp_path, 100)
    assert results.selection_noise == []
    assert {row.context for row in results.nll} == {None, "shared"}
    assert not any(row.policy == "executed-together" for row in results.nll)
    assert pick(results.claims, id="C5", domain="pooled").estimate is None


def test_only_the_main_context_speaks_for_the_oracle(analysed):
    _, _, results = analysed
    rows = [row for row in results.main_nll if row.policy in ("oracle", "executed-together")]
    assert {row.context for row in rows} == {"shared"}
    assert len(rows) == 2 * 3 * 7
    assert len(results.nll) == len(results.main_nll) + 2 * 3


def test_best_of_curve_falls_from_random_to_static(analysed):
    _, _, results = analysed
    curve = pick(results.best_of_patterns, domain="code", big_layers=3)
    assert curve.patterns == 20
    assert (curve.drawn[0], curve.drawn[-1]) == (1, 100)
    for index, policy in ((0, "random-patterns"), (-1, "static")):
        row = pick(results.nll, domain="code", policy=policy, big_layers=3)
        assert curve.nll[index].value == pytest.approx(row.nll.value)


def test_differences_from_all_big_are_paired(tmp_path):
    """Documents differ by tenths of a nat, but the policies on them move together."""
    write_run(tmp_path, Plan(noise=0.05))
    results = analyse(tmp_path, 300)
    big = pick(results.nll, domain="prose", policy="all-big")
    for row in results.nll:
        if row.domain == "prose":
            assert row.over_all_big.value == pytest.approx(row.nll.value - big.nll.value, abs=1e-12)
    oracle = pick(results.nll, domain="prose", policy="oracle", big_layers=3)
    assert _width(oracle.over_all_big) < 0.5 * _width(oracle.nll)


def test_patterns_on_a_sample_are_compared_on_all_tokens(tmp_path):
    """What was run on a quarter of the tokens stands beside what was run on all, within its interval."""
    write_run(tmp_path / "all", Plan(documents=30))
    write_run(tmp_path / "sample", Plan(documents=30, counted_share=0.25))
    exact, estimated = (analyse(tmp_path / name, 300) for name in ("all", "sample"))
    assert estimated.data["prose"] == Size(documents=30, tokens=600, pattern_tokens=150)
    for k in (1, 3, 5):
        wanted = pick(exact.nll, domain="pooled", policy="random-patterns", big_layers=k)
        found = pick(estimated.nll, domain="pooled", policy="random-patterns", big_layers=k)
        assert found.nll.value == pytest.approx(wanted.nll.value, abs=0.02)
        assert found.over_all_big.low < wanted.over_all_big.value < found.over_all_big.high


def test_planted_effects_are_found(analysed):
    """Noise per route makes the middle best for the oracle; late layers gain more, so they are big more often."""
    _, _, results = analysed
    verdicts = {(claim.id, claim.domain): claim.verdict for claim in results.claims}
    assert verdicts["C2", "pooled"] == "reproduced"
    assert verdicts["C6", "pooled"] == "reproduced"
    assert verdicts["C8", "pooled"] == "not reproduced"
    assert {domain for _, domain in verdicts} == {"code", "prose", "pooled"}


def test_more_documents_give_narrower_intervals(tmp_path):
    widths = []
    for documents in (6, 60):
        run = tmp_path / str(documents)
        write_run(run, Plan(documents=documents, router_budgets=()))
        row = pick(analyse(run, 300).nll, domain="pooled", policy="all-big")
        widths.append(_width(row.nll))
    assert widths[1] < 0.6 * widths[0]


def test_one_domain_without_routers(own_run):
    for path in (own_run / "oracle").glob("code*"):
        path.unlink()
    for path in (own_run / "evaluate").glob("*/*.parquet"):
        path.unlink()
    results = analyse(own_run, 100)
    assert list(results.data) == ["prose"]
    assert {row.domain for row in results.nll} == {"prose"}
    assert results.gap_closed == []
    assert pick(results.claims, id="C1").verdict == "undecided"


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
    assert analyse(own_run, 100).model["parameters"] == 17


def test_no_torch():
    code = (
        "import sys; from pathlib import Path; from duollm.analysis.analyse import analyse; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_best_of_random_routes_falls_to_the_oracle(own_run, synthetic):
    """Where every route is drawn the best is the oracle's; both stand at equal distance from all big."""
    truth, document = synthetic[1]["prose"], [f"prose/{d:02d}.txt" for d in range(12)]
    ids = truth.space.ids_with(big=3)
    sums = {1: truth.nll_TR[:, ids].mean(1), len(ids): truth.nll_TR[:, ids].min(1)}
    rows = {
        "document": document * 2,
        "big_layers": [3] * 24,
        "drawn": np.repeat(list(sums), 12),
        "nll_sum": np.concatenate([nll_T.reshape(12, 20).sum(1) for nll_T in sums.values()]),
    }
    write_parquet(own_run / "oracle" / "prose.best_of.parquet", rows, {"num_layers": 6})
    results = analyse(own_run, 100)
    [row] = results.best_of_routes
    assert (row.domain, row.big_layers, row.patterns, row.drawn) == ("prose", 3, 20, [1, 20])
    for place, policy in enumerate(("random-patterns", "oracle")):
        wanted = pick(results.main_nll, domain="prose", policy=policy, big_layers=3)
        assert row.nll[place].value == pytest.approx(wanted.nll.value)
        assert row.over_all_big[place].value == pytest.approx(wanted.over_all_big.value)
        assert row.over_all_big[place].low == pytest.approx(wanted.over_all_big.low)
