from functools import partial

import pytest
import torch

from duollm import RouteSpace, search_oracle
from duollm.oracle.beam import beam_search
from duollm.oracle.searches import SEARCHES, compare_with_exact
from naive_oracle import tiny_model, tiny_tokens


def test_all_searches_answer_alike():
    model, tokens, space = tiny_model(), tiny_tokens(), RouteSpace(3)
    for name, search in SEARCHES.items():
        found = search(model, tokens, space, "reference", [1, 2])
        assert found.big_layers == [1, 2], name
        assert found.nll.shape == found.route_ids.shape == (2, 2, 5), name


@pytest.mark.parametrize("context", ["shared", "reference"])
def test_comparison_reports_recall_and_excess(context):
    model, tokens, space = tiny_model(6), tiny_tokens(), RouteSpace(6)
    searches = {"exact": search_oracle, "narrow": partial(beam_search, width=2)}
    rows = compare_with_exact(model, tokens, space, context, [2, 3], searches)
    assert [(row.name, row.big) for row in rows] == [("exact", 2), ("exact", 3), ("narrow", 2), ("narrow", 3)]
    assert all(row.recall == 1 and row.excess == 0 and row.seconds > 0 for row in rows[:2])
    exact = search_oracle(model, tokens, space, context, [2, 3]).nll
    found = beam_search(model, tokens, space, context, [2, 3], width=2).nll
    for row, excess in zip(rows[2:], found - exact, strict=True):
        assert row.recall == pytest.approx((excess < 1e-4).float().mean().item())
        assert row.excess == pytest.approx(excess.mean().item())
        assert row.excess > 0


def test_twelve_layers():
    model, tokens, space = tiny_model(12), tiny_tokens(1, 4), RouteSpace(12)
    rows = compare_with_exact(model, tokens, space, "reference", [4])
    assert [row.name for row in rows] == ["exact", "beam", "local", "sampled"]
    assert all(0 <= row.recall <= 1 and row.excess > -1e-5 for row in rows)
    assert not torch.tensor([row.seconds for row in rows]).isnan().any()
