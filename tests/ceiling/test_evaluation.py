import json

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from duollm.ceiling.evaluation import (
    CeilingPolicy,
    choose,
    evaluate_ceiling,
    predicted_margins,
    validation_windows,
)
from duollm.ceiling.predictor import all_big_states, exact_choice, make_predictors, margins, price_for, priced_choice
from duollm.config import CeilingConfig, EvaluateConfig
from duollm.measure.comparison import compared_windows
from duollm.models.branch import Branch
from duollm.records.keys import SHUFFLED
from duollm.routes.space import RouteSpace
from tiny import tiny_model
from tiny_corpus import packed_corpus

SKIP, SMALL, BIG = Branch
BRANCHES = (SMALL, BIG)
SPACE = RouteSpace(3, BRANCHES)
TEXT = EvaluateConfig(documents=3, windows_per_document=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return packed_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def model(data):
    return tiny_model(vocab_size=data.vocab_size).requires_grad_(False)


@pytest.fixture(scope="module")
def predictors(model):
    predictors = make_predictors(model, CeilingConfig(depths=[0, 2], width=8), SPACE, seed=0)
    for parameter in predictors.parameters():
        torch.nn.init.normal_(parameter)
    for predictor in predictors.values():
        predictor.told.weight.data *= 0.1  # gains that differ by layer would hide those by token
    return predictors.eval()


@pytest.fixture(scope="module")
def measured(tmp_path_factory, model, predictors, data):
    run = tmp_path_factory.mktemp("run")
    texts, validation_WT = compared_windows(data, TEXT, 0), validation_windows(data, TEXT.windows_per_document, 0)
    evaluate_ceiling(model, predictors, [1, 2], SPACE, validation_WT, texts, run)
    table = pq.read_table(run / "ceiling" / "owls.parquet")
    return run, table, json.loads(table.schema.metadata[b"duollm"])


def test_every_depth_is_executed_at_a_third_of_the_layers_and_the_chosen_one_and_the_control_at_every_budget(measured):
    _, table, facts = measured
    made = {(each["predictor"], each["spend"], each["big_layers"]) for each in facts["policies"]}
    assert len(made) == len(facts["policies"])
    for spend in ("average", "exact"):
        assert {name for name, way, k in made if (way, k) == (spend, 1)} == {"l0", "l2", SHUFFLED}
        [chosen] = [
            each["predictor"]
            for each in facts["policies"]
            if each["chosen"] and (each["spend"], each["big_layers"]) == (spend, 2)
        ]
        assert {name for name, way, k in made if (way, k) == (spend, 2)} == {chosen, SHUFFLED}
    assert all((each["validation_nll"] is None) == (each["predictor"] == SHUFFLED) for each in facts["policies"])
    columns = {f"{what}_{each['column']}" for each in facts["policies"] for what in ("nll", "route")}
    assert columns <= set(table.column_names)
    assert (facts["num_layers"], facts["branches"]) == (3, ["small", "big"])


def test_losses_are_those_of_the_routes_executed_together(measured, model, predictors, data):
    _, table, _ = measured
    ids_WT = torch.from_numpy(data.windows("test", "owls", 3, 1, seed=0).token_ids)
    states_WTF = all_big_states(model, ids_WT)
    gains_WTLC = predictors["l2"](states_WTF, torch.full(ids_WT.shape, 1 / 3), torch.zeros(*ids_WT.shape, 3))
    routes_WTL = exact_choice(*margins(gains_WTLC, predictors["l2"].interactions(), BRANCHES), 1, SPACE)
    assert table.column("route_exact_l2_k1").to_pylist() == RouteSpace(3).encode(routes_WTL[:, :-1]).flatten().tolist()
    logits = model(ids_WT, routes=routes_WTL).logits
    nll_WT = -logits[:, :-1].log_softmax(-1).gather(-1, ids_WT[:, 1:, None])[..., 0]
    assert table.column("nll_exact_l2_k1").to_pylist() == pytest.approx(nll_WT.flatten().tolist(), abs=1e-4)


def test_budgets_are_kept(measured):
    _, table, facts = measured
    space = RouteSpace(3)
    for each in facts["policies"]:
        big = space.count_big(table.column(f"route_{each['column']}").to_numpy())
        if each["spend"] == "exact":
            assert set(big) == {each["big_layers"]}
            assert each["price"] is None
        else:
            assert big.mean() == pytest.approx(each["big_layers"], abs=0.5), "a price from validation text"
            assert len(set(big)) > 1


def test_the_predictors_are_kept(measured, predictors):
    weights = load_file(measured[0] / "ceiling" / "predictors.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in predictors.state_dict().items())


def test_margins_do_not_depend_on_the_batch(model, predictors):
    ids_WT = torch.randint(31, (20, 5), generator=torch.Generator().manual_seed(0))
    whole = predicted_margins(model, predictors, [1], RouteSpace(3), ids_WT)
    single = predicted_margins(model, predictors, [1], RouteSpace(3), ids_WT[18:19])
    for ours, theirs in zip(single["l0", 1], whole["l0", 1], strict=True):
        torch.testing.assert_close(ours, theirs[18:19], atol=1e-4, rtol=1e-4)


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
    assert exact_choice(MARGIN_NL, OTHERWISE_NL, k, SPACE).tolist() == routes


@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_priced_choice_spend_k_on_average(k):
    routes_NL = priced_choice(MARGIN_NL, OTHERWISE_NL, price_for(MARGIN_NL, k, SPACE))
    assert (routes_NL == BIG).sum() == 3 * k
    assert torch.equal(routes_NL[routes_NL != BIG], OTHERWISE_NL[routes_NL != BIG])


def test_a_price_gives_more_to_tokens_that_gain_more():
    routes_NL = priced_choice(MARGIN_NL, OTHERWISE_NL, price_for(MARGIN_NL, 1, SPACE))
    assert routes_NL.tolist() == [[1, 1, 0], [2, 2, 2], [0, 1, 1]]


def test_the_depth_is_chosen_on_validation_text_and_never_the_control():
    losses = {"l0": 3.0, "l5": 2.9, SHUFFLED: 2.0}
    policies = [CeilingPolicy(name, 5, "exact", 4, None, loss) for name, loss in losses.items()]
    policies += [CeilingPolicy(name, 5, "average", 4, 0.1, -loss) for name, loss in losses.items()]
    chosen = [(policy.predictor, policy.spend) for policy in choose(policies) if policy.chosen]
    assert chosen == [("l5", "exact"), ("l0", "average")]
