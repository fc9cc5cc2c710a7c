import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from duollm.errors import UserError
from duollm.models.branch import Branch
from duollm.records.keys import Key
from duollm.records.tokens import read_ceiling, read_oracle, read_tokens
from duollm.routes.space import RouteSpace
from synthetic_ceiling import CHOSEN, write_ceiling
from synthetic_run import Plan, write_parquet, write_run


def _facts(path):
    return json.loads(pq.read_schema(path).metadata[b"duollm"])


def _rewrite(path, change, **facts):
    """Write the table again after `change`, with some other facts."""
    table = change(pq.read_table(path))
    write_parquet(path, {name: table.column(name) for name in table.column_names}, _facts(path) | facts)


def _same(table):
    return table


def test_the_oracle_is_read_as_it_was_written(synthetic):
    run, truths = synthetic
    truth, tokens = truths["prose"], read_oracle(run, "prose")
    assert (tokens.domain, tokens.space, tokens.context) == ("prose", truth.space, "shared")
    assert tokens.documents == [f"prose/{d:02d}.txt" for d in range(12)]
    assert np.array_equal(tokens.document_T, truth.document_T)
    assert np.array_equal(tokens.position_T, truth.position_T)
    assert tokens.text[3] == "\n"
    assert tokens.searched() == list(range(7))
    for k in range(7):
        ids = truth.space.ids_with(big=k)
        np.testing.assert_array_equal(tokens.oracle(k).nll_T, truth.nll_TR[:, ids].min(1))
        np.testing.assert_array_equal(tokens.oracle(k).route_T, ids[truth.nll_TR[:, ids].argmin(1)])
        assert ((tokens.oracle(k).routes_TL == Branch.BIG).sum(1) == k).all()


def test_sums_are_by_document(synthetic):
    run, truths = synthetic
    tokens, truth = read_oracle(run, "prose"), truths["prose"]
    assert tokens.tokens_D.tolist() == [20] * 12
    sums_D = tokens.by_document(tokens.policies[Key("all-big", 6)].nll_T)
    np.testing.assert_allclose(sums_D, truth.nll_TR[:, -1].reshape(12, 20).sum(1))


def test_static_on_all_tokens_is_read_where_it_is(own_run):
    path, nll_T = own_run / "oracle" / "prose.parquet", np.arange(240, dtype=np.float32)
    _rewrite(path, lambda table: table.append_column("nll_static_k2", pa.array(nll_T)))
    static = {key.big_layers: one for key, one in read_oracle(own_run, "prose").policies.items() if key[0] == "static"}
    assert list(static) == [2]
    assert np.array_equal(static[2].nll_T, nll_T)
    assert static[2].route_T is None
    route_T = np.arange(len(nll_T)) % 64
    _rewrite(path, lambda table: table.append_column("route_static_k2", pa.array(route_T)))
    assert read_oracle(own_run, "prose").policies[Key("static", 2)].route_T.tolist() == route_T.tolist()


def _contexts(tokens):
    found = [key for key in tokens.policies if key.policy == "oracle"]
    return [(key.context, key.big_layers) for key in found]


def test_contexts_come_main_first_each_with_its_budgets(own_run):
    path, shared = own_run / "oracle" / "prose.parquet", [("shared", k) for k in range(7)]
    assert _contexts(read_oracle(own_run, "prose")) == [*shared, ("committed", 2)]
    _rewrite(path, _same, context="committed", contexts=["committed"])
    tokens = read_oracle(own_run, "prose")
    assert _contexts(tokens) == [("committed", 2), *shared]
    assert tokens.searched() == [2]


def test_ramps_are_named_by_their_ends_and_spend_what_their_routes_do(synthetic):
    policies = read_oracle(synthetic[0], "prose").policies
    for name in ("oracle-ramp1to3", "oracle-ramp3to1"):
        ramp = policies[Key(name, 2, context="shared")]
        np.testing.assert_array_equal(ramp.spent_T, (ramp.routes_TL == Branch.BIG).sum(1))


def test_routers_come_by_kind_and_budget_on_the_oracles_tokens(compared):
    run, truths, _ = compared
    tokens, files = read_tokens(run, "code")
    named = [(key.policy, key.kind, key.spend) for key in tokens.routers()]
    assert named[:3] == [
        ("gains_k1", "gains", "average"),
        ("gains_k1_exact", "gains", "exact"),
        ("gains_k2", "gains", "average"),
    ]
    assert named[-1] == ("linear-k5", "linear", "average")
    assert [key for file in files for key in file.policies] == list(tokens.routers())
    linear = tokens.policies[Key("linear-k2", 2, "linear", "average")]
    np.testing.assert_array_equal(linear.route_T, truths["code"].router_route_T[2])
    exact = tokens.policies[Key("gains_k3_exact", 3, "gains", "exact")]
    assert (exact.spent_T == 3).all()
    assert (exact.flops_per_token, exact.router_flops_per_token) == (1310, 10)


def test_rows_of_more_text_are_found_again_in_any_order(own_run, synthetic):
    path = own_run / "evaluate" / "linear-k2" / "prose.parquet"

    def extended(table):
        more = table.set_column(1, "window", pa.array(np.ones(len(table)), pa.int32()))
        return pa.concat_tables([more, table.take(np.arange(len(table))[::-1])])

    _rewrite(path, extended)
    tokens, files = read_tokens(own_run, "prose")
    router = tokens.policies[Key("linear-k2", 2, "linear", "average")]
    np.testing.assert_array_equal(router.route_T, synthetic[1]["prose"].router_route_T[2])
    assert [len(file.document_T) for file in files] == [240, 480, 240, 240, 240]


def test_skipping_saves_what_the_file_says(own_run):
    path = own_run / "evaluate" / "linear-k2" / "prose.parquet"
    space, costs = RouteSpace(6, tuple(Branch)), [-0.25, 0.0, 1.0]
    routes = np.resize([space.encode(np.array([0, 0, 1, 1, 2, 2])), space.encode(np.array([2] * 6))], 240)
    facts = {"branches": ["skip", "small", "big"], "branch_costs": costs}
    _rewrite(path, lambda table: table.set_column(5, "route", pa.array(routes)), **facts)
    tokens, _ = read_tokens(own_run, "prose")
    assert tokens.policies[Key("linear-k2", 2, "linear", "average")].spent_T[:2].tolist() == [1.5, 6]


def test_every_predictor_of_the_ceiling_is_read_and_the_chosen_one_under_its_name(tmp_path):
    write_ceiling(tmp_path, write_run(tmp_path, Plan(documents=4)), (2, 3))
    policies = read_ceiling(tmp_path / "ceiling" / "prose.parquet").policies
    for k, predictor in CHOSEN.items():
        assert policies[Key("ceiling", k)] is policies[Key(f"predictor-{predictor}", k)]
        assert policies[Key("ceiling-exact", k)] is policies[Key(f"predictor-{predictor}-exact", k)]
    assert {key.policy for key in policies if "shuffled" in key.policy} == {
        "ceiling-shuffled",
        "ceiling-shuffled-exact",
    }


def test_no_routers_is_no_error(own_run):
    for path in (own_run / "evaluate").glob("*/*.parquet"):
        path.unlink()
    tokens, files = read_tokens(own_run, "code")
    assert tokens.routers() == {}
    assert files == []


def test_missing_file(synthetic):
    with pytest.raises(UserError, match=r"poetry\.parquet: no such file"):
        read_oracle(synthetic[0], "poetry")


def test_not_a_parquet_file(own_run):
    (own_run / "oracle" / "prose.parquet").write_text("hello")
    with pytest.raises(UserError, match="not a readable Parquet file") as error:
        read_oracle(own_run, "prose")
    assert "\n" not in str(error.value)


def test_a_parquet_file_of_someone_else(own_run):
    write_parquet(own_run / "oracle" / "prose.parquet", {"a": pa.array([1])}, None)
    with pytest.raises(UserError, match="no `duollm` metadata"):
        read_oracle(own_run, "prose")


@pytest.mark.parametrize("column", ["nll_shared_k3", "route_shared_k3", "nll_big"])
def test_missing_column(own_run, column):
    _rewrite(own_run / "oracle" / "prose.parquet", lambda table: table.drop_columns([column]))
    with pytest.raises(UserError, match=f"column '{column}' is missing"):
        read_oracle(own_run, "prose")


def test_route_ids_outside_the_space(own_run):
    path = own_run / "evaluate" / "linear-k2" / "prose.parquet"
    _rewrite(path, lambda table: table.set_column(5, "route", pa.array(np.full(len(table), 64))))
    with pytest.raises(UserError, match=r"route ids outside 0 \.\. 63"):
        read_tokens(own_run, "prose")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda table: table.slice(1),
        lambda table: table.set_column(3, "token_id", pa.array(np.full(len(table), 301), pa.int32())),
    ],
    ids=["fewer", "others"],
)
def test_routers_must_cover_the_oracles_tokens(own_run, spoil):
    _rewrite(own_run / "evaluate" / "linear-k2" / "prose.parquet", spoil)
    with pytest.raises(UserError, match=r"lacks tokens or layers of .* delete the folder .*evaluate and run"):
        read_tokens(own_run, "prose")


def test_a_ceiling_of_other_tokens_is_refused(own_run, tmp_path):
    write_ceiling(tmp_path / "other", write_run(tmp_path / "other", Plan(documents=5)), (2,))
    (tmp_path / "other" / "ceiling").rename(own_run / "ceiling")
    with pytest.raises(UserError, match=r"ceiling/\w+\.parquet: lacks tokens .* run `duollm study` again"):
        read_tokens(own_run, "prose")
