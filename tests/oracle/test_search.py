import pytest
import torch

from duollm import Branch, RouteSpace, loss_table, search_oracle
from duollm.oracle.budgets import AtMost, Exactly, FlopsShare, OnAverage, Schedule
from duollm.oracle.noise import DrawnLabels
from duollm.oracle.reductions import LeafTable, RandomRoutes
from duollm.oracle.search import SEARCHES, executed_nll
from naive_oracle import GROUPED, forward_nll, naive_committed, naive_table, tiny_model, tiny_tokens

SKIP, SMALL, BIG = Branch
OPTIONS = [(SMALL, BIG), (SKIP, BIG), (SKIP, SMALL, BIG)]
SPACES = {"-".join(branch.name.lower() for branch in each): RouteSpace(3, each) for each in OPTIONS} | GROUPED
KINDS = [
    pytest.param(space, scope, heads, id=f"{name} {scope} kv{heads}")
    for name, space in SPACES.items()
    for scope in ("ffn", "layer")
    for heads in (1, 2)
]
every_space = pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)


def best_of(table, ids):
    return table[..., ids].min(-1).values


def assert_picks(result, table, space):
    """Route ids decode to routes whose loss is the one reported."""
    for nll, ids in zip(result.nll, result.route_ids, strict=True):
        torch.testing.assert_close(table.gather(-1, ids[..., None])[..., 0], nll, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("space", "scope", "heads"), KINDS)
@pytest.mark.parametrize("context", ["shared", "reference"])
def test_search_and_table_equal_one_forward_per_route(space, scope, heads, context):
    model, tokens = tiny_model(space.num_layers, scope, heads), tiny_tokens()
    truth = naive_table(model, tokens, space, context)
    torch.testing.assert_close(loss_table(model, tokens, space, context), truth, atol=1e-4, rtol=0)
    result = search_oracle(model, tokens, space, context)
    assert result.big_layers == space.big_layers
    for big, nll in zip(result.big_layers, result.nll, strict=True):
        torch.testing.assert_close(nll, best_of(truth, space.ids_with(big)), atol=1e-4, rtol=0)
    assert_picks(result, truth, space)


@pytest.mark.parametrize(("space", "scope", "heads"), KINDS)
def test_committed_search_equals_one_forward_per_token_and_route(space, scope, heads):
    model, tokens = tiny_model(space.num_layers, scope, heads), tiny_tokens()
    result = search_oracle(model, tokens, space, "committed", big_layers=space.big_layers[1:3])
    for k, big in enumerate(result.big_layers):
        allowed = [torch.as_tensor(space.ids_with(big))] * 5
        nll, _ = naive_committed(model, tokens, space, allowed)
        torch.testing.assert_close(result.nll[k], nll, atol=1e-4, rtol=0)
        executed = executed_nll(model, tokens, space, result.route_ids[k])
        torch.testing.assert_close(executed, result.nll[k], atol=1e-4, rtol=0)


@pytest.mark.parametrize("context", ["shared", "reference", "committed"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_other_tokens(context, side):
    model, space, short = tiny_model(), RouteSpace(3), tiny_tokens(1, 4, seed=5)
    alone = search_oracle(model, short, space, context, big_layers=[1])
    pad, ones = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    order = (lambda a, b: (a, b)) if side == "left" else (lambda a, b: (b, a))
    tokens = torch.cat([torch.cat(order(pad, short), 1), tiny_tokens(1, 6)])
    mask = torch.cat([torch.cat(order(pad, ones), 1), torch.ones(1, 6, dtype=torch.long)])
    result = search_oracle(model, tokens, space, context, big_layers=[1], attention_mask=mask)
    counted = slice(2, None) if side == "left" else slice(None, 3)
    torch.testing.assert_close(result.nll[0, 0, counted], alone.nll[0, 0], atol=1e-4, rtol=0)
    padded = result.nll[0, 0].isnan()
    assert padded.sum() == 2
    assert (result.route_ids[0, 0][padded] == -1).all()
    assert not result.nll[0, 1].isnan().any()


def test_reference_may_be_any_routes():
    model, tokens, space = tiny_model(), tiny_tokens(), RouteSpace(3)
    reference = torch.randint(0, 3, (2, 6, 3), generator=torch.Generator().manual_seed(3))
    truth = naive_table(model, tokens, space, "reference", reference)
    torch.testing.assert_close(
        loss_table(model, tokens, space, "reference", reference=reference), truth, atol=1e-4, rtol=0
    )


def test_a_reference_that_its_picks_agree_with_is_realised_by_one_forward():
    model, tokens, space = tiny_model(), tiny_tokens(), RouteSpace(3)
    routes, route_ids = torch.full((2, 6, 3), 2), None
    for _ in range(8):
        before, result = route_ids, search_oracle(model, tokens, space, "reference", [1], reference=routes)
        route_ids = result.route_ids
        routes[:, :-1] = space.decode(route_ids[0])
    assert route_ids.equal(before)
    torch.testing.assert_close(executed_nll(model, tokens, space, route_ids[0]), result.nll[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("space", [RouteSpace(6), RouteSpace(9, (SKIP, BIG), 6, {4: BIG})], ids=["layers", "groups"])
@pytest.mark.parametrize("context", ["shared", "reference"])
def test_pruning_changes_nothing_and_spares_leaves(closer_bound, space, context):
    model, tokens = tiny_model(space.num_layers), tiny_tokens()
    kept = [DrawnLabels(2), RandomRoutes(5)]
    pruned = search_oracle(model, tokens, space, context, reductions=kept)
    full = search_oracle(model, tokens, space, context, reductions=kept, prune=False)
    assert pruned.route_ids.equal(full.route_ids)
    assert set(pruned.columns) == {"nll", "route", "random_nll", "resampled_nll", "resampled_score", "resampled_route"}
    for name, column in pruned.columns.items():
        torch.testing.assert_close(column, full.columns[name], atol=1e-5, rtol=0)
    assert full.evaluated_share == 1
    assert pruned.evaluated_share < 0.8


@every_space
def test_small_memory_gives_the_same_result(space):
    model, tokens = tiny_model(space.num_layers), tiny_tokens()
    wide, deep = (search_oracle(model, tokens, space, memory_bytes=size) for size in (2**30, 1))
    torch.testing.assert_close(wide.nll, deep.nll, atol=1e-5, rtol=0)
    assert wide.route_ids.equal(deep.route_ids)


@every_space
def test_every_budget_is_the_best_of_what_it_allows(space):
    model, tokens, most = tiny_model(space.num_layers), tiny_tokens(), space.big_layers[1]
    truth = naive_table(model, tokens, space, "shared")
    routes = space.decode(torch.arange(space.size))
    big, small = (routes == BIG).sum(-1), (routes == SMALL).sum(-1)
    share = (48 * big + 8 * small) / (48 * space.num_layers)
    falling = (*reversed(space.big_layers), *[space.big_layers[0]] * 5)[:5]
    result = search_oracle(model, tokens, space, budgets=[AtMost(most), FlopsShare(0.5), Schedule(falling)])
    torch.testing.assert_close(result.nll[0], best_of(truth, (big <= most).nonzero()[:, 0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(result.nll[1], best_of(truth, (share <= 0.5).nonzero()[:, 0]), atol=1e-4, rtol=0)
    for position, count in enumerate(falling):
        expected = best_of(truth[:, position], space.ids_with(count))
        torch.testing.assert_close(result.nll[2, :, position], expected, atol=1e-4, rtol=0)


def test_committed_search_follows_a_schedule():
    model, tokens, space = tiny_model(), tiny_tokens(), RouteSpace(3)
    result = search_oracle(model, tokens, space, "committed", budgets=[Schedule((3, 2, 1, 0, 0))])
    allowed = [torch.as_tensor(space.ids_with(count)) for count in (3, 2, 1, 0, 0)]
    torch.testing.assert_close(result.nll[0], naive_committed(model, tokens, space, allowed)[0], atol=1e-4, rtol=0)


def test_budget_on_average_is_the_best_split_between_tokens():
    model, tokens, space = tiny_model(), tiny_tokens(1, 6), RouteSpace(3)
    frontier = search_oracle(model, tokens, space).nll[:, 0]
    spent = torch.cartesian_prod(*[torch.arange(4)] * 5)
    total = frontier[spent, torch.arange(5)].sum(-1)
    for mean in (0, 1, 2, 3):
        best = total[spent.sum(-1) <= mean * 5].min()
        found = search_oracle(model, tokens, space, budgets=[OnAverage(mean)])
        assert space.count_big(found.route_ids).sum() <= mean * 5
        steps = (frontier[:-1] - frontier[1:]).abs().max()
        assert best - 1e-5 <= found.nll.sum() <= best + 3 * steps  # the Lagrangian misses at most a token's step


def test_padding_spends_nothing_of_an_average():
    model, space = tiny_model(), RouteSpace(3)
    alone = search_oracle(model, tiny_tokens(1, 4), space, budgets=[OnAverage(1)])
    padded = torch.cat([tiny_tokens(1, 4), torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    result = search_oracle(model, padded, space, budgets=[OnAverage(1)], attention_mask=mask)
    assert result.route_ids[0, 0, :3].equal(alone.route_ids[0, 0])


@pytest.mark.parametrize("space", [RouteSpace(4), RouteSpace(7, (SKIP, BIG), 4)], ids=["layers", "groups"])
def test_random_routes_compete_only_if_drawn(space):
    model, tokens = tiny_model(space.num_layers), tiny_tokens()
    found = search_oracle(model, tokens, space, reductions=[RandomRoutes(2)])
    assert (found.columns["random_nll"] >= found.nll - 1e-5).all()
    assert (found.columns["random_nll"] > found.nll + 1e-3).any()
    many = search_oracle(model, tokens, space, reductions=[RandomRoutes(200)])
    torch.testing.assert_close(many.columns["random_nll"], many.nll, atol=1e-5, rtol=0)


@every_space
def test_a_table_holds_its_tokens_under_every_route(space):
    model, tokens = tiny_model(space.num_layers), tiny_tokens()
    truth = naive_table(model, tokens, space, "shared").flatten(0, 1)
    counted = torch.tensor([1, 1, 0, 1, 1, 0, 0, 0, 1, 1]).bool()
    table = LeafTable(counted, space.size)
    search_oracle(model, tokens, space, reductions=[table])
    torch.testing.assert_close(table.nll_MR, truth[counted], atol=1e-4, rtol=0)


@pytest.mark.parametrize("space", [RouteSpace(3), GROUPED["groups with fixed"]], ids=["layers", "groups"])
@pytest.mark.parametrize("pairs", [1, 3])
def test_drawn_labels_are_picked_and_scored_with_their_own_losses(space, pairs):
    model, tokens, drawn, big = tiny_model(space.num_layers), tiny_tokens(), DrawnLabels(pairs), space.big_layers[1]
    result = search_oracle(model, tokens, space, big_layers=[big], reductions=[drawn])
    ids = torch.as_tensor(space.ids_with(big))
    with torch.no_grad():
        log_p = torch.stack([model(tokens, routes=space.decode(r)).logits[:, :-1].log_softmax(-1) for r in ids])
    label_2SRBT1 = drawn.label_2SN.view(2, pairs, 1, 2, 5, 1).expand(-1, -1, len(ids), -1, -1, -1)
    first_SRBT, second_SRBT = (-torch.stack([log_p.gather(-1, each) for each in of])[..., 0] for of in label_2SRBT1)
    best = first_SRBT.min(1, keepdim=True)
    first_excess, second_excess = drawn.excess_2SN.view(2, pairs, 2, 5)
    nll = (best.values[:, 0] - first_excess).mean(0)
    score = (second_SRBT.gather(1, best.indices)[:, 0] - second_excess).mean(0)
    torch.testing.assert_close(result.columns["resampled_nll"][0], nll, atol=1e-4, rtol=0)
    torch.testing.assert_close(result.columns["resampled_score"][0], score, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", SEARCHES)
def test_all_methods_answer_alike(name):
    found = search_oracle(tiny_model(), tiny_tokens(), RouteSpace(3), "reference", [1, 2], method=name)
    assert found.big_layers == [1, 2]
    assert found.nll.shape == found.route_ids.shape == (2, 2, 5)


def test_ties_go_to_the_cheaper_then_the_smaller_id():
    model, tokens, space = tiny_model(), tiny_tokens(), RouteSpace(3, (SKIP, SMALL, BIG))
    torch.nn.init.zeros_(model.model.norm.weight)  # all logits are 0: equal losses that no CPU rounds differently
    result = search_oracle(model, tokens, space, budgets=[Exactly(1), AtMost(3), Exactly(0)])
    assert (result.route_ids[0] == space.encode(torch.tensor([0, 0, 2]))).all()
    assert (result.route_ids[1] == 0).all()
    assert (result.route_ids[2] == 0).all()


@pytest.mark.parametrize("context", ["shared", "reference", "committed"])
def test_every_context_reads_only_earlier_tokens(context):
    model, tokens, space = tiny_model(), tiny_tokens(), RouteSpace(3)
    later = tokens.clone()
    later[:, 4:] = (later[:, 4:] + 1) % 97
    first, second = (search_oracle(model, each, space, context, [1]) for each in (tokens, later))
    torch.testing.assert_close(first.nll[..., :3], second.nll[..., :3], atol=1e-5, rtol=0)


@every_space
def test_executed_together_is_one_forward_with_the_picks(space):
    model, tokens = tiny_model(space.num_layers), tiny_tokens()
    found = search_oracle(model, tokens, space, big_layers=space.big_layers[1:2])
    routes = torch.full((2, 6, space.num_layers), 2)
    routes[:, :-1] = space.decode(found.route_ids[0])
    torch.testing.assert_close(
        executed_nll(model, tokens, space, found.route_ids[0]), forward_nll(model, tokens, routes)
    )


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_losses_are_float32_whatever_the_default_type(default):
    model, ids, space = tiny_model(), tiny_tokens(1, 4), RouteSpace(3)
    expected, table = search_oracle(model, ids, space).nll, loss_table(model, ids, space, "shared")
    torch.set_default_dtype(default)
    try:
        assert search_oracle(model, ids, space).nll.equal(expected)
        assert loss_table(model, ids, space, "shared").equal(table)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_table_of_committed_losses_is_refused():
    with pytest.raises(ValueError, match="use search_oracle"):
        loss_table(tiny_model(), tiny_tokens(), RouteSpace(3), "committed")


def test_the_closer_bound_spares_leaves_of_a_large_vocabulary(monkeypatch):
    model, tokens, space = tiny_model(6), tiny_tokens(1, 20), RouteSpace(6)
    model.lm_head.weight.data[60:] *= 0.1  # rare words
    one = search_oracle(model, tokens, space)
    monkeypatch.setattr("duollm.oracle.trial.LARGE", 1)
    monkeypatch.setattr("duollm.oracle.head._WORDS", 60)
    both = search_oracle(model, tokens, space)
    assert both.evaluated_share < 0.9 * one.evaluated_share
    torch.testing.assert_close(both.nll, one.nll, atol=1e-5, rtol=0)
    assert both.route_ids.equal(one.route_ids)
