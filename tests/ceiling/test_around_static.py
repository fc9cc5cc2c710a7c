"""The ceiling around static: on validation text no policy is worse than static, and groups stay whole."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from duollm.ceiling.evaluation import AroundStatic, evaluate_ceiling, validation_windows
from duollm.ceiling.predictor import exact_choice, make_predictors, price_for, priced_choice
from duollm.config import CeilingConfig
from duollm.data.packed import Windows
from duollm.measure.executor import policy_losses
from duollm.models.branch import Branch
from duollm.records.keys import SHUFFLED
from duollm.routers.static import static_priors
from duollm.routes.space import RouteSpace
from tiny import tiny_model
from tiny_corpus import packed_corpus

SPACES = {
    "equal": RouteSpace(6, (Branch.SKIP, Branch.BIG), 3),
    "unequal and fixed": RouteSpace(6, (Branch.SKIP, Branch.BIG), [[0], [1, 4], [3, 5]], {2: Branch.BIG}),
}


@pytest.fixture(params=SPACES.values(), ids=SPACES)
def space(request):
    return request.param


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return packed_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def model(data):
    return tiny_model(vocab_size=data.vocab_size, num_hidden_layers=6).requires_grad_(False)


@pytest.fixture
def predictors(model, space):
    predictors = make_predictors(model, CeilingConfig(depths=[1], width=8), space, seed=0)
    for parameter in predictors.parameters():
        torch.nn.init.normal_(parameter)
    return predictors.eval()


def test_random_predictions_cost_nothing_on_validation_text(tmp_path, model, predictors, space, data):
    validation_WT = validation_windows(data, 1, 0)
    budgets = space.big_layers[1:-1]
    priors = static_priors(model, space, validation_WT, budgets)
    windows = range(len(validation_WT))
    texts = {"owls": Windows(validation_WT.numpy(), [f"owl {window}" for window in windows], [0 for _ in windows])}
    evaluate_ceiling(model, predictors, budgets, space, validation_WT, texts, tmp_path, priors)
    table = pq.read_table(tmp_path / "ceiling" / "owls.parquet")
    facts = json.loads(table.schema.metadata[b"duollm"])
    assert RouteSpace.from_facts(facts) == space
    for each in facts["policies"]:
        k, big = each["big_layers"], space.count_big(table.column(f"route_{each['column']}").to_numpy())
        assert each["scale"] in (0.0, 0.25, 1.0)
        if each["scale"] == 0 or each["spend"] == "exact":
            assert set(big) == {k}
        if each["predictor"] != SHUFFLED and each["spend"] == "average":
            static = policy_losses(model, validation_WT, routes=priors[k].route_L)[0].mean().item()
            assert np.mean(table.column(f"nll_{each['column']}")) <= static + 1e-5
            assert (each["chosen"], each["validation_nll"]) == (True, None)  # the only depth
    assert {each["predictor"] for each in facts["policies"]} == {"l1", SHUFFLED}


def test_without_differences_between_tokens_the_routes_are_static(model, predictors, space, data):
    validation_WT = validation_windows(data, 1, 0)
    k = space.big_layers[1]
    priors = static_priors(model, space, validation_WT, [k])
    around = AroundStatic(space, priors, {"l1": torch.zeros(3)}, {("l1", k): 0.0})
    margin, otherwise = around.margins("l1", k, torch.randn(4, 5, 3, 2))
    for choice in (
        priced_choice(margin, otherwise, price_for(margin, k, space)),
        exact_choice(margin, otherwise, k, space),
    ):
        assert (space.spread(choice) == priors[k].route_L).all()


@pytest.mark.parametrize("k", range(7))
def test_exactly_k_layers_are_those_that_gain_most_together(k):
    """The naive truth: all routes with k big layers."""
    space = RouteSpace(6, (Branch.SKIP, Branch.BIG), [[0], [1, 2], [3, 4, 5]])
    margin_NJ = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    choice_NJ = exact_choice(margin_NJ, torch.zeros(20, 3, dtype=torch.int64), k, space)
    routes_RL = space.decode(torch.from_numpy(space.ids_with(k)))
    worth_NR = margin_NJ @ ((routes_RL[:, space.leaders] == Branch.BIG).float() * torch.tensor([1.0, 2.0, 3.0])).T
    assert torch.equal(space.spread(choice_NJ), routes_RL[worth_NR.argmax(1)])
