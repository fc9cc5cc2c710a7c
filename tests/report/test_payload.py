from dataclasses import replace

import numpy as np
import pytest

from duollm.analysis.results import read_results
from duollm.records.keys import Key
from duollm.records.tokens import PolicyTokens, read_tokens
from duollm.report import payload
from duollm.report.payload import compressed, drawn_from, pack_tokens, page_data
from duollm.routes.space import RouteSpace
from synthetic_run import Plan, write_run

EVERYTHING = 10**9


def unpack(packed, layers):
    """Read a block as page/decode.js does: losses [T], and routes [T, L] or None, by policy."""
    block, size, found, at, steps = packed["block"], len(packed["text"]), {}, 0, []
    for policy in packed["policies"]:
        low_T, high_T = np.frombuffer(block[at : at + 2 * size], np.uint8).reshape(2, size).astype(int)
        zigzag_T = low_T | high_T << 8
        steps_T = np.where(zigzag_T % 2, -(zigzag_T + 1) // 2, zigzag_T // 2)
        steps.append(steps_T if policy["base"] is None else steps_T + steps[policy["base"]])
        at += 2 * size
        routes_TL = None
        if policy["routes"]:
            length = -(-size * layers // 4)
            bits = np.unpackbits(np.frombuffer(block[at : at + length], np.uint8))[: 2 * size * layers]
            routes_TL, at = (bits.reshape(size, layers, 2) @ [2, 1]), at + length
        found[policy["policy"], policy["k"], policy["context"]] = steps[-1] * payload.LOSS_UNIT, routes_TL
    return found, block[at:]


def test_the_command_on_the_page_names_no_private_folder(compared, prose):
    results = read_results(compared[0])
    for given in (
        ["duollm", "study", "/tmp/w.yaml", "--out", "runs/w"],
        "duollm study /tmp/w.yaml --out runs/w",
    ):
        mine = replace(results, provenance=results.provenance | {"command": given})
        shown = page_data(compared[0], mine, [prose], 1, [])["results"]["provenance"]["command"]
        assert shown == ["duollm", "study", "w.yaml", "--out", "runs/w"]


@pytest.fixture
def prose(compared):
    return read_tokens(compared[0], "prose")[0]


def test_unpacked_losses_and_routes_are_those_of_the_files(prose):
    found, _ = unpack(pack_tokens(prose, 100, EVERYTHING), prose.space.num_layers)
    assert ("gains, exact", 3, None) in found
    for key, one in prose.policies.items():
        if (key.variant, key.big_layers, key.context) in found:
            nll_T, routes_TL = found[key.variant, key.big_layers, key.context]
            np.testing.assert_allclose(nll_T, one.nll_T, atol=payload.LOSS_UNIT / 2 + 1e-9)
            assert (routes_TL is None) == (one.route_T is None or key.auxiliary)
            if routes_TL is not None:
                np.testing.assert_array_equal(routes_TL, one.routes_TL)


def test_predictions_follow_the_policies(prose):
    packed = pack_tokens(prose, 100, EVERYTHING)
    rest, size = unpack(packed, prose.space.num_layers)[1], len(packed["text"])
    assert len(rest) == 2 * size + 5 * 3 * size
    rank_T = np.frombuffer(rest[:size], np.uint8) // 2  # zigzag, and small enough for the low byte
    assert rank_T.tolist() == prose.file.integers("rank")[:size].tolist()
    for column in range(5):
        at = 2 * size + 3 * size * column
        words = [packed["words"][place // 2] for place in rest[at : at + size]]
        assert words == [row[column] for row in prose.file.lists("top5_text")[:size]]
        shares = list(rest[at + 2 * size : at + 3 * size])
        assert shares == [np.rint(100 * row[column]) for row in prose.file.lists("top5_probability")[:size]]


def test_predictions_may_be_absent(prose, monkeypatch):
    without = replace(prose.file, table=prose.file.table.drop_columns(["rank"]))
    packed = pack_tokens(replace(prose, file=without), 100, EVERYTHING)
    assert "words" not in packed
    assert unpack(packed, prose.space.num_layers)[1] == b""


def test_the_gain_on_drawn_labels_stands_for_the_two_policies_that_it_compares(prose):
    found, _ = unpack(pack_tokens(prose, 100, EVERYTHING), prose.space.num_layers)
    static, oracle = (
        prose.policies[key].nll_T for key in (Key("drawn-static", 2), Key("drawn-oracle", 2, context="shared"))
    )
    np.testing.assert_allclose(found["drawn-gain", 2, "shared"][0], static - oracle, atol=payload.LOSS_UNIT / 2 + 1e-9)
    assert not {"drawn-static", "drawn-oracle", "drawn-second"} & {policy for policy, *_ in found}


def test_policies_are_stored_as_differences_from_what_is_alike(prose):
    policies = pack_tokens(prose, 100, EVERYTHING)["policies"]
    names = [(one["policy"], one["k"]) for one in policies]
    base_of = {name: one["base"] is not None and names[one["base"]] for name, one in zip(names, policies, strict=True)}
    assert base_of["all-big", 6] is False
    assert base_of["oracle", 3] == ("oracle", 2)
    assert (base_of["oracle", 0], base_of["oracle", 6]) == (("all-small", 0), ("all-big", 6))


@pytest.mark.parametrize("nll", [0.0, 12.3456, 1e3])
def test_extreme_losses(prose, nll):
    key = Key("static", 1)
    space = RouteSpace(prose.space.num_layers)
    tokens = replace(prose, policies={**prose.policies, key: PolicyTokens(np.full(len(prose.text), nll), space=space)})
    shown = unpack(pack_tokens(tokens, 100, EVERYTHING), prose.space.num_layers)[0]["static", 1, None][0]
    np.testing.assert_allclose(shown, min(nll, 163.83), atol=payload.LOSS_UNIT / 2)


def test_whole_documents_are_kept_as_long_as_they_fit(prose, monkeypatch):
    assert pack_tokens(prose, 2, EVERYTHING)["documents"] == prose.documents[:2]
    monkeypatch.setattr(payload, "MOST_TOKENS", 50)
    packed = pack_tokens(prose, 100, EVERYTHING)
    assert (len(packed["documents"]), len(packed["text"]), packed["tokens"]) == (2, 40, len(prose.text))
    assert (packed["document"], packed["window"]) == ([0, 20], [0, 20])
    monkeypatch.setattr(payload, "MOST_TOKENS", 15)
    assert len(pack_tokens(prose, 100, EVERYTHING)["text"]) == 15


def test_fewer_tokens_are_shown_where_they_would_take_more_than_the_page_has(prose):
    everything = pack_tokens(prose, 100, EVERYTHING)
    size = 4 / 3 * len(compressed(everything))
    packed = pack_tokens(prose, 100, int(0.5 * size))
    assert 0.2 * size < 4 / 3 * len(compressed(packed)) <= 0.5 * size
    assert packed["documents"] == everything["documents"][: len(packed["documents"])]
    assert len(packed["text"]) % 20 == 0  # whole documents
    assert 1 <= len(pack_tokens(prose, 100, 1)["text"]) < 20


def test_runs_on_one_page_share_what_it_has(compared, monkeypatch):
    run, results, domains = compared[0], read_results(compared[0]), [read_tokens(compared[0], "prose")[0]]
    given = []
    monkeypatch.setattr(payload, "pack_tokens", lambda tokens, documents, most_bytes: given.append(most_bytes))
    for runs in (1, 4):
        payload.page_data(run, results, domains, 100, [], runs)
    assert given == [payload.MOST_BYTES, payload.MOST_BYTES // 4]


def test_fifty_thousand_tokens_at_the_entropy_of_a_real_study_take_less_than_the_page_has(tmp_path):
    """The losses of the synthetic run differ by some tenths of a nat from policy to policy, as real ones do."""
    write_run(tmp_path, Plan(documents=20, tokens_per_document=200, router_budgets=(2, 4)), {"prose": [" the", "er"]})
    packed = pack_tokens(read_tokens(tmp_path, "prose")[0], 1000, EVERYTHING)
    assert len(packed["policies"]) > 20
    assert 4 / 3 * len(compressed(packed)) / len(packed["text"]) < payload.MOST_BYTES / 50_000


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "the model's own prediction"),
        ({"labels_temperature": 0.7}, "the model's own prediction at temperature 0.7"),
        ({"labels_from": "0123abcd"}, "another model's prediction"),
    ],
)
def test_the_page_says_what_labels_were_drawn_from(facts, words):
    assert drawn_from(facts) == words
