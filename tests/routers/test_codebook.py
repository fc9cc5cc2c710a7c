import pytest
import torch

from duollm.config import LARGEST_CODEBOOK, RouterConfig
from duollm.models.branch import Branch
from duollm.routers.calibration import ExactBudget
from duollm.routers.codebook import CodebookRouter, choose_routes, cross_fitted, regress
from duollm.routers.registry import load_router, make_router, save_router
from duollm.routes.space import RouteSpace
from tiny import random_ids, tiny_model
from tiny_labels import labels_of, made_up_labels
from tiny_training import router_training

LAYERS, AT = 5, 2
PREFIX = [2, 1]


@pytest.fixture
def router(make_random):
    """Three routes in use, of 2, 2 and 3 big layers, alike in the first two."""
    router = make_random(kind=CodebookRouter, num_hidden_layers=LAYERS)
    router.decide_at = AT
    with torch.no_grad():
        router.routes_RL[:3] = torch.tensor([[*PREFIX, 2, 1, 1], [*PREFIX, 1, 1, 2], [*PREFIX, 1, 2, 2]])
        router.bias_R[:3] = 0
        router.bias_R[3:] = -torch.inf
    return router


@pytest.fixture
def model():
    return tiny_model(num_hidden_layers=LAYERS)


def naive_routes(router, model, ids, price=0.0, among=range(3)):
    """Route by route: the states at the layer of decision when all tokens are on the common start."""
    seen = []

    def note(layer, states, memory):
        seen.append(states)
        return torch.full(states.shape[:2], PREFIX[layer] if layer < AT else 1), None

    model(ids, policy=note)
    best = torch.full(ids.shape, -torch.inf)
    routes = torch.zeros(*ids.shape, LAYERS, dtype=torch.long)
    for row in among:
        big = (router.routes_RL[row] == Branch.BIG).sum()
        worth = seen[AT] @ router.weight_RD[row] + router.bias_R[row] - price * big
        routes[worth > best] = router.routes_RL[row]
        best = torch.maximum(best, worth)
    return routes


@pytest.mark.parametrize("price", [-3.0, 0.0, 3.0])
def test_every_token_takes_the_route_of_highest_worth(router, model, price):
    router.price.fill_(price)
    ids = random_ids(4)
    routes = model(ids, policy=router).routes
    assert torch.equal(routes, naive_routes(router, model, ids, price))
    assert len(routes.flatten(0, 1).unique(dim=0)) > 1


def test_under_an_exact_budget_only_routes_that_spend_it_are_taken(router, model):
    router.price.fill_(-100.0)  # without the budget all would take the route of three
    ids = random_ids(4)
    assert (model(ids, policy=router).routes == Branch.BIG).sum(-1).eq(3).all()
    assert torch.equal(
        model(ids, policy=ExactBudget(router, 2)).routes, naive_routes(router, model, ids, among=range(2))
    )


def test_an_exact_budget_that_no_route_spends_is_met_nevertheless(router, model):
    routes = model(random_ids(), policy=ExactBudget(router, 4)).routes
    assert ((routes == Branch.BIG).sum(-1) == 4).all()


def test_a_saved_codebook_chooses_as_before(router, model, tmp_path):
    save_router(router, tmp_path / "saved", {"kind": "codebook", "branches": ["small", "big"]})
    loaded, _ = load_router(tmp_path / "saved", model.config)
    assert loaded.decide_at == AT
    ids = random_ids()
    assert torch.equal(model(ids, policy=loaded).routes, model(ids, policy=router).routes)


def test_flops_are_those_of_the_routes_in_use(router):
    assert router.flops_per_token() == 2 * 3 * 16
    assert CodebookRouter(tiny_model().config, router.branches).flops_per_token() == 2 * LARGEST_CODEBOOK * 16


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_routes_are_chosen_as_by_trying_each(seed, number):
    loss, predicted = draw(30, 9, seed=seed), draw(30, 9, seed=seed) + draw(30, 9, seed=seed + 10)

    def mean_loss(routes):
        picks = [routes[int(predicted[token, routes].argmin())] for token in range(30)]
        return torch.stack([loss[token, pick] for token, pick in enumerate(picks)]).mean().item()

    naive = [4]
    while len(naive) < number:
        tried = {route: mean_loss([*naive, route]) for route in range(9) if route not in naive}
        best = min(tried, key=tried.get)
        if tried[best] >= mean_loss(naive):
            break
        naive.append(best)
    assert choose_routes(loss, predicted, 4, number) == naive


def test_no_route_is_added_that_helps_nobody():
    loss = torch.tensor([[0.0, 1.0, 1.0]]).repeat(5, 1)
    assert choose_routes(loss, -loss, 0, 3) == [0], "predictions that are wrong make every other route worse"


def test_the_regression_solves_the_normal_equations():
    states, loss = draw(40, 5), draw(40, 3, seed=1)
    for penalty, weights in zip((0.0, 0.3), regress(states, loss, (0.0, 0.3)), strict=True):
        centred = states - states.mean(0)
        amount = penalty * centred.square().sum() / 5 * torch.eye(5)
        naive = torch.linalg.solve(centred.T @ centred + amount, centred.T @ (loss - loss.mean(0)))
        torch.testing.assert_close(weights[:-1], naive, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(weights[-1], loss.mean(0) - states.mean(0) @ naive, atol=1e-4, rtol=1e-3)


def test_a_folds_predictions_come_from_the_other_folds():
    states, loss, fold = draw(40, 5), draw(40, 3, seed=1), torch.arange(40) // 10
    penalty, predicted = cross_fitted(states, loss, fold)
    changed = loss.clone()
    changed[fold == 2] += 5.0 * draw(10, 3, seed=2)
    refitted = regress(states[fold != 2], changed[fold != 2], [penalty])[0]
    torch.testing.assert_close(predicted[fold == 2], states[fold == 2] @ refitted[:-1] + refitted[-1])


def test_noise_is_shrunk_away_and_structure_is_not():
    states, fold = draw(80, 8), torch.arange(80) // 20
    weak, _ = cross_fitted(states, draw(80, 4, seed=1), fold)
    strong, predicted = cross_fitted(states, states @ draw(8, 4, seed=2), fold)
    assert strong < weak
    torch.testing.assert_close(predicted, states @ draw(8, 4, seed=2), atol=0.1, rtol=0.1)


class TestFit:
    @pytest.fixture
    def model(self):
        return tiny_model(num_hidden_layers=4)

    def fit(self, model, labels, branches=("small", "big"), **changes):
        router = make_router("codebook", model.config, list(branches)).eval()
        router.fit(router_training(model, RouterConfig(**changes), 0.5, labels=labels))
        return router

    @pytest.mark.parametrize("decide_at", [0, 1, 2])
    def test_tokens_take_the_routes_that_their_labels_favour(self, model, decide_at):
        """By the sign of a state, one or another route of two big layers is best, and no third one is good."""
        space = RouteSpace(4)
        first, second = (space.encode(torch.tensor(route)) for route in ([1, 2, 2, 1], [1, 2, 1, 2]))

        def favoured(ids):
            seen = {}

            def note(layer, states, memory):
                seen[layer] = states
                return torch.full(ids.shape, [1, 2, 2, 1][layer]), None

            model(ids, policy=note)
            return torch.where(seen[decide_at][..., 3] > 0, first, second)

        losses = torch.ones(48, 7, space.size).index_fill(-1, torch.stack([first, second]), 0.5)
        ids_WT = random_ids(48, 8, seed=7)
        losses.scatter_(-1, favoured(ids_WT)[:, :-1, None], 0.0)
        router = self.fit(model, labels_of(space, ids_WT, losses), decide_at=decide_at)
        ids = random_ids(32, 8, seed=11)
        taken = space.encode(model(ids, policy=router).routes)
        assert set(taken.unique().tolist()) == {int(first), int(second)}
        assert (taken == favoured(ids)).float().mean() > 0.8

    def test_a_price_moves_tokens_to_neighbouring_budgets(self, model):
        space, ids_WT = RouteSpace(4), random_ids(32, 8)
        weight = torch.where(ids_WT[:, :-1] < model.config.vocab_size // 2, 0.2, 1.0)
        losses = -weight[..., None] * space.count_big(torch.arange(space.size))  # big helps some tokens more
        router = self.fit(model, labels_of(space, ids_WT, losses), decide_at=0)
        spent = []
        for price in (-10.0, 0.6, 10.0):
            router.price.fill_(price)
            spent.append((model(random_ids(), policy=router).routes == Branch.BIG).sum(-1).float().mean().item())
        assert (spent[0], spent[2]) == (3, 1)
        assert 1.3 < spent[1] < 2.7

    def test_all_routes_start_alike_and_hold_the_best_single_one(self, model):
        labels = made_up_labels(RouteSpace(4), windows=32)
        router = self.fit(model, labels, decide_at=2, codebook_routes=5)
        assert int(router.bias_R.isfinite().sum()) <= 5
        assert len(router.routes_RL[:, :2].unique(dim=0)) == 1
        indices = labels.with_big(2, 2)
        best = indices[labels.losses(indices, 0.0).mean((0, 1)).argmin()]
        assert router.routes_RL[0].equal(labels.space.decode(labels.route_ids_R[best]))

    def test_skip_may_be_among_the_branches(self, model):
        space = RouteSpace(4, tuple(Branch))
        router = self.fit(model, made_up_labels(space, windows=16), ["skip", "small", "big"], decide_at=0)
        assert (model(random_ids(), policy=router).routes == Branch.SKIP).any()
