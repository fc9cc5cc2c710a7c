import base64
import zlib
from dataclasses import replace

import numpy as np
import pytest

from duollm.records.keys import Key
from duollm.records.tokens import PolicyTokens, read_tokens
from duollm.report import payload
from duollm.report.payload import pack_tokens
from duollm.routes.space import RouteSpace


def unpack(packed, layers):
    """Read a block as page/decode.js does: losses [T], and routes [T, L] or None, by policy."""
    block, size, found, at = zlib.decompress(base64.b64decode(packed["block"])), len(packed["text"]), {}, 0
    big_T = 0
    for policy in packed["policies"]:
        low_T, high_T = np.frombuffer(block[at : at + 2 * size], np.uint8).reshape(2, size).astype(int)
        zigzag_T = low_T | high_T << 8
        steps_T = np.where(zigzag_T % 2, -(zigzag_T + 1) // 2, zigzag_T // 2) + big_T
        big_T = big_T if found else steps_T
        at += 2 * size
        routes_TL = None
        if policy["routes"]:
            length = -(-size * layers // 4)
            bits = np.unpackbits(np.frombuffer(block[at : at + length], np.uint8))[: 2 * size * layers]
            routes_TL, at = (bits.reshape(size, layers, 2) @ [2, 1]), at + length
        found[policy["policy"], policy["k"], policy["context"]] = steps_T * payload.LOSS_UNIT, routes_TL
    return found, block[at:]


@pytest.fixture
def prose(compared):
    return read_tokens(compared[0], "prose")[0]


def test_unpacked_losses_and_routes_are_those_of_the_files(prose):
    found, _ = unpack(pack_tokens(prose, 100), prose.space.num_layers)
    assert ("gains, exact", 3, None) in found
    for key, one in prose.policies.items():
        if (key.variant, key.big_layers, key.context) in found:
            nll_T, routes_TL = found[key.variant, key.big_layers, key.context]
            np.testing.assert_allclose(nll_T, one.nll_T, atol=payload.LOSS_UNIT / 2 + 1e-9)
            assert (routes_TL is None) == (one.route_T is None or key.auxiliary)
            if routes_TL is not None:
                np.testing.assert_array_equal(routes_TL, one.routes_TL)


def test_predictions_follow_the_policies(prose):
    packed = pack_tokens(prose, 100)
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
    packed = pack_tokens(replace(prose, file=without), 100)
    assert "words" not in packed
    assert unpack(packed, prose.space.num_layers)[1] == b""


@pytest.mark.parametrize("nll", [0.0, 12.3456, 1e3])
def test_extreme_losses(prose, nll):
    key = Key("static", 1)
    space = RouteSpace(prose.space.num_layers)
    tokens = replace(prose, policies={**prose.policies, key: PolicyTokens(np.full(len(prose.text), nll), space=space)})
    shown = unpack(pack_tokens(tokens, 100), prose.space.num_layers)[0]["static", 1, None][0]
    np.testing.assert_allclose(shown, min(nll, 32.767), atol=5e-4)


def test_whole_documents_are_kept_as_long_as_they_fit(prose, monkeypatch):
    assert pack_tokens(prose, 2)["documents"] == prose.documents[:2]
    monkeypatch.setattr(payload, "MOST_TOKENS", 50)
    packed = pack_tokens(prose, 100)
    assert (len(packed["documents"]), len(packed["text"]), packed["tokens"]) == (2, 40, len(prose.text))
    assert (packed["document"], packed["window"]) == ([0, 20], [0, 20])
    monkeypatch.setattr(payload, "MOST_TOKENS", 15)
    assert len(pack_tokens(prose, 100)["text"]) == 15
