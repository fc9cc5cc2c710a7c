import pytest
import torch

from duollm.ceiling.routes import CeilingPolicy, choose, exact_routes, margins, price_for, priced_routes
from duollm.models.branch import Branch
from duollm.records.keys import SHUFFLED

SKIP, SMALL, BIG = Branch


def test_margins_compare_big_with_the_best_other_branch():
    gains_LC = torch.tensor([[1.0, 2.0, 5.0], [3.0, 0.0, 1.0]])
    margin_L, otherwise_L = margins(gains_LC, torch.zeros(2, 2, 3), (SKIP, SMALL, BIG))
    assert margin_L.tolist() == [3.0, -2.0]
    assert otherwise_L.tolist() == [SMALL, SKIP]


@pytest.mark.parametrize("branches", [(SMALL, BIG), (SKIP, SMALL, BIG)], ids=["two", "three"])
def test_layers_are_taken_in_turn(branches):
    """The naive truth: one token at a time, always the layer that gains most given those taken before."""
    generator = torch.Generator().manual_seed(3)
    gains_NLC = torch.randn(6, 5, len(branches), generator=generator)
    interactions_LLC = 0.5 * torch.randn(5, 5, len(branches), generator=generator)
    margin_NL, _ = margins(gains_NLC, interactions_LLC, branches)
    for gains_LC, margin_L in zip(gains_NLC, margin_NL, strict=True):
        taken, least = [], float("inf")
        while len(taken) < 5:
            gained = {}
            for layer in set(range(5)) - set(taken):
                at_C = gains_LC[layer] + sum(interactions_LLC[before, layer] for before in taken)
                at_C = at_C + interactions_LLC[layer, layer] / 2
                gained[layer] = (at_C[-1] - at_C[:-1].max()).item()
            layer = max(gained, key=gained.get)
            least = min(least, gained[layer])
            assert margin_L[layer].item() == pytest.approx(least, abs=1e-3)
            taken.append(layer)
        assert margin_L.argsort(descending=True).tolist() == taken


MARGIN_NL = torch.tensor([[0.3, -0.1, 0.2], [0.9, 0.8, 0.7], [-0.5, -0.4, -0.3]])
OTHERWISE_NL = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]])


@pytest.mark.parametrize(
    ("k", "routes"),
    [
        (0, [[1, 1, 0], [1, 1, 1], [0, 1, 1]]),
        (1, [[2, 1, 0], [2, 1, 1], [0, 1, 2]]),
        (2, [[2, 1, 2], [2, 2, 1], [0, 2, 2]]),
        (3, [[2, 2, 2], [2, 2, 2], [2, 2, 2]]),
    ],
)
def test_exact_routes_take_the_layers_that_gain_most(k, routes):
    assert exact_routes(MARGIN_NL, OTHERWISE_NL, k).tolist() == routes


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_priced_routes_spend_k_on_average(k):
    routes_NL = priced_routes(MARGIN_NL, OTHERWISE_NL, price_for(MARGIN_NL, k))
    assert (routes_NL == BIG).sum() == 3 * k
    assert torch.equal(routes_NL[routes_NL != BIG], OTHERWISE_NL[routes_NL != BIG])


def test_a_price_gives_more_to_tokens_that_gain_more():
    routes_NL = priced_routes(MARGIN_NL, OTHERWISE_NL, price_for(MARGIN_NL, 1))
    assert routes_NL.tolist() == [[1, 1, 0], [2, 2, 2], [0, 1, 1]]


def test_the_depth_is_chosen_on_validation_text_and_never_the_control():
    losses = {"l0": 3.0, "l5": 2.9, SHUFFLED: 2.0}
    policies = [CeilingPolicy(name, 5, "exact", 4, None, loss) for name, loss in losses.items()]
    policies += [CeilingPolicy(name, 5, "average", 4, 0.1, -loss) for name, loss in losses.items()]
    chosen = [(policy.predictor, policy.spend) for policy in choose(policies) if policy.chosen]
    assert chosen == [("l5", "exact"), ("l0", "average")]
