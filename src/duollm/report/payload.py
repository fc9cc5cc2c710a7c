"""Packs the data of the page: the numbers of results.json, and losses and routes token by token.

A domain's losses and routes are one compressed block of bytes, which page/decode.js reads. A loss is a whole number of
thousandths of a nat. All losses but those of all big are stored as differences from all big, which compress better.

Shape letters: T tokens, L layers.
"""

import base64
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from duollm.analysis.claims.evidence import studied_router
from duollm.analysis.difficulty import HIGH_LOSS_QUANTILE
from duollm.analysis.results import Results
from duollm.records.bootstrap import Floats, Integers
from duollm.records.keys import ALL_BIG, SHUFFLED, Key
from duollm.records.tokens import Tokens
from duollm.report.figures import shown_budget

LOSS_UNIT = 1e-3
"""Nats per step of a packed loss."""
MOST_TOKENS = 50_000
"""Tokens per domain on the page, at most; whole documents are kept as long as they fit."""
_LARGEST = 2**15 - 1
"""The largest number that two bytes hold after `_bytes`' zigzag."""
_DIGITS = 5
_HIDDEN = ("predictor-", f"ceiling-{SHUFFLED}", "best-of-", "oracle-ramp", "drawn-oracle-ramp")
"""How the names of policies begin whose tokens are not on the page."""
_FIELDS = (
    *("provenance", "model", "context", "bootstrap", "nll", "comparison", "families", "spend", "agreement", "timing"),
    *("selection_noise", "units", "difficulty", "ceiling", "decomposition", "best_of_patterns", "best_of_routes"),
    "claims",
)


def page_data(
    run: Path, results: Results, domains: Sequence[Tokens], shown_documents: int, missing: Sequence[str]
) -> dict[str, Any]:
    """Return what page/main.js reads, ready for JSON."""
    everything = asdict(results)
    shares = [{**row, "share_by_layer_and_position": None} for row in everything["layer_use"]]
    return {
        "name": run.resolve().name,
        "missing": list(missing),
        "layers": results.num_layers,
        "headline": results.headline,
        "sizes": everything["data"],
        "budget": shown_budget(domains),
        "router": studied_router(row.kind for row in results.nll),
        "search": domains[0].file.fact("search"),
        "randomRoutes": domains[0].file.fact("random_routes"),
        "branches": [branch.name.lower() for branch in domains[0].space.branches],
        "groups": domains[0].space.facts["groups"],
        "highLoss": HIGH_LOSS_QUANTILE,
        "lossUnit": LOSS_UNIT,
        "folder": "figures",
        "figures": sorted(path.stem for path in (run / "figures").glob("*.svg")),
        "results": _rounded({name: everything[name] for name in _FIELDS} | {"layer_use": shares}),
        "domains": [pack_tokens(tokens, shown_documents) for tokens in domains],
    }


def pack_tokens(tokens: Tokens, shown_documents: int) -> dict[str, Any]:
    """Return the text of a domain, and losses and routes of its policies as base64 of compressed bytes."""
    ends_D = np.cumsum(tokens.tokens_D)
    documents = max(1, int((ends_D[:shown_documents] <= MOST_TOKENS).sum()))
    shown = int(min(ends_D[documents - 1], MOST_TOKENS))
    big = Key(ALL_BIG, tokens.space.num_layers)
    big_T = _steps(tokens.policies[big].nll_T[:shown])
    blocks, policies = [_bytes(big_T)], [_name(big)]
    for key, one in tokens.policies.items():
        if key != big and not key.policy.startswith(_HIDDEN):
            difference_T = _steps(one.nll_T[:shown]) - big_T
            blocks.append(_bytes(difference_T))
            has_routes = one.route_T is not None and not key.auxiliary
            policies.append(_name(key) | {"routes": has_routes})
            blocks += [_routes(one.at(np.arange(shown)).routes_TL)] if has_routes else []
    predicted, more = _predictions(tokens, shown)
    blocks += more
    return {
        "name": tokens.domain,
        "tokens": len(tokens.document_T),
        "text": tokens.text[:shown],
        "documents": tokens.documents[:documents],
        "document": _changes(tokens.document_T[:shown]),
        "window": _changes(tokens.window_T[:shown] + (tokens.document_T[:shown] << 20)),
        "position": int(tokens.position_T[0]),
        "policies": policies,
        **predicted,
        "block": base64.b64encode(zlib.compress(b"".join(blocks), 9)).decode(),
    }


def _predictions(tokens: Tokens, shown: int) -> tuple[dict[str, Any], list[bytes]]:
    """Return the words that all big predicted, the most frequent first, and blocks: ranks, then words and percentages.

    Both are empty if the run did not keep predictions, or if they are more words than two bytes can number.
    """
    if not tokens.file.has("rank"):
        return {}, []
    texts_T5 = np.array(tokens.file.lists("top5_text")[:shown], dtype=object)
    percent_T5 = np.rint(100 * np.array(tokens.file.lists("top5_probability")[:shown])).astype(np.uint8)
    words = [word for word, _ in Counter(texts_T5.flatten().tolist()).most_common()]
    if len(words) > _LARGEST:
        return {}, []
    place = {word: index for index, word in enumerate(words)}
    blocks = [_bytes(np.minimum(tokens.file.integers("rank")[:shown], _LARGEST))]
    for column in range(texts_T5.shape[1]):
        blocks.append(_bytes(np.array([place[word] for word in texts_T5[:, column]])))
        blocks.append(percent_T5[:, column].tobytes())
    return {"words": words, "predictions": texts_T5.shape[1]}, blocks


def _name(key: Key) -> dict[str, Any]:
    return {"policy": key.variant, "k": key.big_layers, "context": key.context, "routes": False}


def _steps(nll_T: Floats) -> Integers:
    """Return losses in steps. Differences of two losses below 65 nats fit into 16 bits after `_bytes`' zigzag."""
    return np.minimum(np.rint(nll_T / LOSS_UNIT), _LARGEST).astype(np.int64)


def _bytes(values_T: Integers) -> bytes:
    """Return small integers of either sign as a plane of low bytes and a plane of high bytes."""
    zigzag_T = np.where(values_T < 0, -2 * values_T - 1, 2 * values_T).astype("<u2")
    return zigzag_T.view(np.uint8).reshape(-1, 2).T.tobytes()


def _routes(routes_TL: Integers) -> bytes:
    """Return branches as two bits each, token after token, four to a byte, the first in the highest bits."""
    bits = np.stack([routes_TL >> 1, routes_TL & 1], axis=-1).astype(np.uint8)
    return np.packbits(bits).tobytes()


def _changes(values_T: Integers) -> list[int]:
    """Return the rows at which a new value begins."""
    return [0, *(np.flatnonzero(np.diff(values_T)) + 1).tolist()]


def _rounded(value: Any) -> Any:
    """Round floats, and write an estimate as [value, low, high], for a small page."""
    if isinstance(value, dict):
        if value.keys() == {"value", "low", "high"}:
            return [_rounded(number) for number in value.values()]
        return {name: _rounded(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
    return value
