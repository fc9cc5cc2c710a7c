"""Tests of units against losses of every route, chosen unit by unit in plain Python."""

import numpy as np
import pytest
import torch

from duollm import RouteSpace, search_oracle
from duollm.config import ModelConfig, OracleConfig
from duollm.errors import UserError
from duollm.oracle.noise import Units
from duollm.oracle.plan import check_settings
from duollm.oracle.search import loss_tables
from naive_oracle import tiny_model, tiny_tokens

SPACE = RouteSpace(3)
BUDGETS = [0, 1, 2, 3]


def naive(choosing_TR, scored_TR, size, big, padding_T):
    """Losses of every token under the route that has the lowest mean in the token's unit."""
    big_R, found_T = SPACE.count_big(np.arange(SPACE.size)), np.full(len(choosing_TR), np.nan)
    tokens = [token for token, padded in enumerate(padding_T) if not padded]
    for start in range(0, len(tokens), size):
        unit = tokens[start : start + size]
        means = {route: choosing_TR[unit, route].mean() for route in range(SPACE.size) if big_R[route] == big}
        found_T[unit] = scored_TR[unit, min(means, key=means.get)]
    return found_T


@pytest.mark.parametrize("context", ["shared", "reference"])
@pytest.mark.parametrize("padded", [None, "left", "right"])
def test_units_equal_the_naive_choice(context, padded):
    model, ids = tiny_model(), tiny_tokens(2, 8)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, slice(0, 2) if padded == "left" else slice(6, 8)] = 0
    units = Units([2, 3, 100])
    settings = {"attention_mask": mask} if padded else {}
    found = search_oracle(model, ids, SPACE, context, BUDGETS, reductions=[units], **settings)
    tables = loss_tables(model, ids, SPACE, torch.stack(units.label_3ND), context, **settings)
    table_3BTR = (tables - units.excess_3N.view(3, 2, -1)[..., None]).numpy()
    padding_BT = found.nll[0].isnan()
    for size in units.sizes:
        for name, chooses, scored in (("nll", 0, 0), ("drawn", 1, 1), ("second", 1, 2)):
            column_KBT = found.columns[f"unit{size}_{name}"]
            for big in BUDGETS:
                for row in range(2):
                    tables_2TR = table_3BTR[[chooses, scored], row]
                    expected = naive(*tables_2TR, size, big, padding_BT[row])
                    np.testing.assert_allclose(column_KBT[big, row], expected, atol=1e-5)


def test_a_longer_unit_gains_less_and_a_single_token_is_the_oracle():
    model, ids = tiny_model(), tiny_tokens(2, 8)
    found = search_oracle(model, ids, SPACE, "shared", [1], reductions=[Units([1, 7])])
    torch.testing.assert_close(found.columns["unit1_nll"], found.nll)
    assert found.columns["unit7_nll"].mean() > found.nll.mean()


def test_what_cannot_hold_all_routes_is_refused():
    with pytest.raises(UserError, match="units needs every route, and search beam tries some"):
        check_settings(OracleConfig(units=[8], search="beam"), ModelConfig(), 64)
    with pytest.raises(UserError, match=r"losses of 1,048,576 routes, 1\.5 GiB for each window; raise memory_gib"):
        check_settings(OracleConfig(units=[8]), ModelConfig(num_hidden_layers=20), 128)
