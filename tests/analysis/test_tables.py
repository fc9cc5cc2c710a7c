import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from duollm.analysis.tables import list_domains, read_oracle, read_patterns, read_routers
from duollm.errors import UserError
from synthetic_run import write_parquet


def _facts(path):
    return json.loads(pq.read_schema(path).metadata[b"duollm"])


def _rewrite(path, change):
    """Write the table again after `change`; the metadata stays."""
    write = change(pq.read_table(path))
    write_parquet(path, {name: write.column(name) for name in write.column_names}, _facts(path))


def test_reads_back_what_was_written(synthetic):
    run, truths = synthetic
    assert list_domains(run) == ["code", "prose"]
    truth, oracle = truths["prose"], read_oracle(run, "prose")
    assert oracle.space == truth.space
    assert oracle.context == "shared"
    assert oracle.documents == [f"prose/{d:02d}.txt" for d in range(12)]
    assert np.array_equal(oracle.document_T, truth.document_T)
    assert np.array_equal(oracle.position_T, truth.position_T)
    assert oracle.text[3] == "\n"
    for k in range(7):
        ids = truth.space.ids_with(big=k)
        np.testing.assert_array_equal(oracle.nll_oracle_T[k], truth.nll_TR[:, ids].min(1))
        np.testing.assert_array_equal(oracle.route_oracle_T[k], ids[truth.nll_TR[:, ids].argmin(1)])


def test_domains_come_in_the_order_of_the_recipe(own_run):
    (own_run / "data").mkdir()
    sources = [{"domain": domain, "origin": "..."} for domain in ("prose", "unsearched", "code")]
    (own_run / "data" / "manifest.json").write_text(json.dumps({"sources": sources}))
    assert list_domains(own_run) == ["prose", "code"]


def test_static_on_all_tokens_is_read_where_it_is(own_run):
    path = own_run / "oracle" / "prose.parquet"
    nll_T = np.arange(240, dtype=np.float32)
    _rewrite(path, lambda table: table.append_column("nll_static_k2", pa.array(nll_T)))
    static = read_oracle(own_run, "prose").nll_static_T
    assert list(static) == [2]
    assert np.array_equal(static[2], nll_T)


def test_contexts_come_main_first_each_with_its_budgets(own_run):
    path = own_run / "oracle" / "prose.parquet"
    assert {name: list(found.nll_T) for name, found in read_oracle(own_run, "prose").contexts.items()} == {
        "shared": list(range(7)),
        "committed": [2],
    }
    table = pq.read_table(path)
    columns = {name: table.column(name) for name in table.column_names}
    write_parquet(path, columns, _facts(path) | {"context": "committed", "contexts": ["committed"], "search": "beam"})
    oracle = read_oracle(own_run, "prose")
    assert list(oracle.contexts) == ["committed", "shared"]
    assert list(oracle.nll_oracle_T) == [2]
    assert oracle.search == "beam"


def test_ramps_are_read_by_their_ends(synthetic):
    main = read_oracle(synthetic[0], "prose").contexts["shared"]
    assert set(main.ramp_nll_T) == set(main.ramp_route_T) == {(1, 3), (3, 1)}


def test_patterns_on_fewer_tokens_must_say_so(own_run):
    path = own_run / "oracle" / "prose.routes.parquet"
    fewer = pa.array(np.full(12 * 64, 19), pa.int32())
    _rewrite(path, lambda table: table.set_column(3, "tokens", fewer))
    oracle = read_oracle(own_run, "prose")
    with pytest.raises(UserError, match="token counts are not those of"):
        read_patterns(own_run, oracle)
    table = pq.read_table(path)
    facts = _facts(path) | {"counted_share": 0.95}
    write_parquet(path, {name: table.column(name) for name in table.column_names}, facts)
    assert read_patterns(own_run, oracle).counted_D.tolist() == [19] * 12


def test_patterns_follow_the_oracles_documents_whatever_their_order(own_run, synthetic):
    path = own_run / "oracle" / "prose.routes.parquet"
    shuffled = np.random.default_rng(0).permutation(pq.read_metadata(path).num_rows)
    _rewrite(path, lambda table: table.take(shuffled))
    truth = synthetic[1]["prose"]
    patterns = read_patterns(own_run, read_oracle(own_run, "prose"))
    expected_DR = np.stack([truth.nll_TR[truth.document_T == d].sum(0) for d in range(12)])
    np.testing.assert_allclose(patterns.nll_sum_DR, expected_DR)
    assert patterns.counted_D.tolist() == [20] * 12


def test_routers_come_by_budget(synthetic):
    run, truths = synthetic
    routers = read_routers(run, read_oracle(run, "code"))
    assert [(router.name, router.big_layers) for router in routers] == [(f"linear-k{k}", k) for k in range(1, 6)]
    np.testing.assert_array_equal(routers[0].route_T, truths["code"].router_route_T[1])


def test_no_routers_is_no_error(tmp_path, synthetic):
    oracle = read_oracle(synthetic[0], "code")
    assert read_routers(tmp_path, oracle) == []


def test_no_oracle_results(tmp_path):
    with pytest.raises(UserError, match="run `duollm oracle` first"):
        list_domains(tmp_path)


def test_missing_file(synthetic):
    with pytest.raises(UserError, match=r"poetry\.parquet: no such file"):
        read_oracle(synthetic[0], "poetry")


def test_not_a_parquet_file(own_run):
    path = own_run / "oracle" / "prose.parquet"
    path.write_text("hello")
    with pytest.raises(UserError, match="not a readable Parquet file") as error:
        read_oracle(own_run, "prose")
    assert "\n" not in str(error.value)


def test_a_parquet_file_of_someone_else(own_run):
    write_parquet(own_run / "oracle" / "prose.parquet", {"a": pa.array([1])}, None)
    with pytest.raises(UserError, match="no `duollm` metadata"):
        read_oracle(own_run, "prose")


def test_missing_column(own_run):
    _rewrite(own_run / "oracle" / "prose.parquet", lambda table: table.drop_columns(["nll_shared_k3"]))
    with pytest.raises(UserError, match="column 'nll_shared_k3' is missing"):
        read_oracle(own_run, "prose")


def test_route_ids_outside_the_space(own_run):
    path = own_run / "evaluate" / "linear-k2" / "prose.parquet"
    _rewrite(path, lambda table: table.set_column(5, "route", pa.array(np.full(len(table), 64))))
    with pytest.raises(UserError, match=r"route ids outside 0 \.\. 63"):
        read_routers(own_run, read_oracle(own_run, "prose"))


@pytest.mark.parametrize("spoil", [lambda table: table.slice(1), lambda table: table.take(np.arange(len(table))[::-1])])
def test_routers_must_cover_the_oracles_tokens(own_run, spoil):
    _rewrite(own_run / "evaluate" / "linear-k2" / "prose.parquet", spoil)
    with pytest.raises(UserError, match="lacks tokens or layers of"):
        read_routers(own_run, read_oracle(own_run, "prose"))


def test_incomplete_patterns(own_run):
    _rewrite(own_run / "oracle" / "prose.routes.parquet", lambda table: table.slice(5))
    with pytest.raises(UserError, match="lack some routes"):
        read_patterns(own_run, read_oracle(own_run, "prose"))


def test_patterns_of_other_documents(own_run):
    oracle = read_oracle(own_run, "prose")
    code = own_run / "oracle" / "code.routes.parquet"
    code.rename(own_run / "oracle" / "prose.routes.parquet")
    with pytest.raises(UserError, match="documents are not those of"):
        read_patterns(own_run, oracle)
