"""Packs the data of the page: the numbers of results.json, and losses and routes token by token.

Losses and routes of a domain are one block of bytes, which page/decode.js reads. A loss is a whole number of hundredths
of a nat, stored as its difference from the policy that differs least: often the same policy at the next smaller budget.

Shape letters: T tokens, L layers, P policies.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from duollm.analysis.claims.evidence import studied_router
from duollm.analysis.difficulty import HIGH_LOSS_QUANTILE
from duollm.analysis.results import Results
from duollm.records.bootstrap import Floats, Integers
from duollm.records.keys import ALL_BIG, ALL_SMALL, DRAWN_ORACLE, DRAWN_STATIC, SHUFFLED, Key
from duollm.records.tokens import Tokens
from duollm.report.figures import caption, sample

LOSS_UNIT = 1e-2
"""Nats per step of a packed loss."""
MOST_TOKENS = 50_000
"""Tokens per domain on the page, at most; whole documents are kept as long as they fit."""
MOST_BYTES = 2_500_000
"""Bytes that all tokens take on a page, at most; with style, script and tables that of one run is below 2.8 MB."""
_BASE64 = 4 / 3
_LARGEST = 2**15 - 1
"""The largest number that two bytes hold after `_bytes`' zigzag."""
_DIGITS = 5
_SAMPLE = 1000
"""Tokens on which it is decided from which policy another one is stored as a difference."""
_DRAWN_GAIN = "drawn-gain"
_HIDDEN = ("drawn-", "unit", "predictor-", f"ceiling-{SHUFFLED}", "best-of-", "oracle-ramp")
"""How the names of policies begin whose tokens are not on the page."""
_FIELDS = (
    *("provenance", "model", "context", "bootstrap", "nll", "comparison", "families", "spend", "agreement", "timing"),
    *("selection_noise", "units", "difficulty", "difficulty_by_class", "helped_most", "ceiling", "decomposition"),
    *("best_of_patterns", "best_of_routes", "claims"),
)


def page_data(
    run: Path, results: Results, domains: Sequence[Tokens], shown_documents: int, missing: Sequence[str], runs: int = 1
) -> dict[str, Any]:
    """Return what page/main.js reads, ready for JSON.

    Args:
        runs: number of runs that share the page.
    """
    most_bytes = MOST_BYTES // (runs * len(domains))
    everything = asdict(results)
    everything["provenance"] = _without_folders(everything["provenance"])
    shares = [{**row, "share_by_layer_and_position": None} for row in everything["layer_use"]]
    return {
        "name": run.resolve().name,
        "missing": list(missing),
        "layers": results.num_layers,
        "headline": results.headline,
        "sizes": everything["data"],
        "budget": results.searched_budget,
        "router": studied_router(row.kind for row in results.nll),
        "search": domains[0].file.fact("search"),
        "randomRoutes": domains[0].file.fact("random_routes"),
        "cheapest": results.cheapest,
        "drawnFrom": drawn_from(domains[0].file.facts),
        "branches": [branch.name.lower() for branch in domains[0].space.branches],
        "groups": domains[0].space.facts["groups"],
        "highLoss": HIGH_LOSS_QUANTILE,
        "lossUnit": LOSS_UNIT,
        "folder": "figures",
        "figures": [_figure(path.stem, results) for path in sorted((run / "figures").glob("*.svg"))],
        "results": rounded({name: everything[name] for name in _FIELDS} | {"layer_use": shares}),
        "domains": [pack_tokens(tokens, shown_documents, most_bytes) for tokens in domains],
    }


def _without_folders(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Shorten absolute paths in the command to their last part: a page is shared, and folders are private."""
    command = provenance.get("command", [])
    parts = command.split() if isinstance(command, str) else command
    return {**provenance, "command": [Path(part).name if Path(part).is_absolute() else part for part in parts]}


def drawn_from(facts: Mapping[str, Any]) -> str:
    """From which prediction the labels of the control were drawn, in words."""
    source = "another model's prediction" if "labels_from" in facts else "the model's own prediction"
    temperature = facts.get("labels_temperature", 1)
    return source if temperature == 1 else f"{source} at temperature {temperature:g}"


def _figure(name: str, results: Results) -> dict[str, Any]:
    text, claims = caption(name, results)
    return {"name": name, "caption": text, "claims": claims, "sample": sample(name, results)}


def compressed(page: Mapping[str, Any]) -> bytes:
    """Return a page's data, compressed: JSON and, after a zero, the blocks to which it points by [start, length]."""
    blocks: list[bytes] = []

    def place(block: bytes) -> list[int]:
        blocks.append(block)
        return [sum(map(len, blocks[:-1])), len(block)]

    text = json.dumps(page, ensure_ascii=False, separators=(",", ":"), default=place)
    return zlib.compress(b"\0".join([text.encode(), b"".join(blocks)]), 6)


def pack_tokens(tokens: Tokens, shown_documents: int, most_bytes: int) -> dict[str, Any]:
    """Return the text of a domain, and a block with losses and routes of its policies.

    Args:
        most_bytes: what both may take on the page; if they take more, fewer tokens are shown.
    """
    most = MOST_TOKENS
    ends_D = np.cumsum(tokens.tokens_D)[:shown_documents]
    while True:
        documents = max(1, int((ends_D <= most).sum()))
        shown = int(min(ends_D[documents - 1], most))
        packed = _pack(tokens, documents, shown)
        excess = _BASE64 * len(compressed(packed)) / most_bytes
        if excess <= 1 or shown == 1:
            return packed
        most = max(1, int(0.98 * shown / excess))


def _pack(tokens: Tokens, documents: int, shown: int) -> dict[str, Any]:
    entries = list(_shown_policies(tokens, shown))
    # Half the range: the difference of a gain below 0 and a loss has to fit, too.
    end = _LARGEST // 2
    steps_PT = np.clip(np.rint(np.array([values_T for _, values_T in entries]) / LOSS_UNIT), -end, end)
    blocks, policies = [], []
    for place, (key, _) in enumerate(entries):
        base = _nearest(steps_PT[: place + 1])
        blocks.append(_bytes((steps_PT[place] - (0 if base is None else steps_PT[base])).astype(np.int64)))
        one = tokens.policies.get(key)
        has_routes = one is not None and one.route_T is not None
        name = {"policy": key.variant, "k": key.big_layers, "context": key.context}
        policies.append(name | {"base": base, "routes": has_routes})
        blocks += [_routes(one.at(np.arange(shown)).routes_TL)] if one is not None and has_routes else []
    predicted, more = _predictions(tokens, shown)
    windows = _changes(tokens.window_T[:shown] + (tokens.document_T[:shown] << 20))
    before = tokens.file.strings("before") if tokens.file.has("before") else None
    return {
        "name": tokens.domain,
        "tokens": len(tokens.document_T),
        "text": tokens.text[:shown],
        "begins": before and [before[t] for t in windows],
        "documents": tokens.documents[:documents],
        "document": _changes(tokens.document_T[:shown]),
        "window": windows,
        "position": int(tokens.position_T[0]),
        "policies": policies,
        **predicted,
        "block": b"".join([*blocks, *more]),
    }


def _shown_policies(tokens: Tokens, shown: int) -> Iterator[tuple[Key, Floats]]:
    """Yield policies with their losses [T], budgets in order; all big is first.

    What the oracle's search gains over static on drawn labels stands among them, since both of these are never shown.
    """
    policies, layers = tokens.policies, tokens.space.num_layers
    big, small = Key(ALL_BIG, layers), Key(ALL_SMALL, 0)
    variants = list(dict.fromkeys((key.variant, key.context) for key in policies))
    ordered = sorted(policies, key=lambda key: (variants.index((key.variant, key.context)), key.big_layers))
    for key in (big, small, *(key for key in ordered if key not in (big, small))):
        drawn_static = policies.get(Key(DRAWN_STATIC, key.big_layers))
        if not key.policy.startswith(_HIDDEN):
            yield key, policies[key].nll_T[:shown]
        elif key.policy == DRAWN_ORACLE and drawn_static:
            gain_T = drawn_static.nll_T[:shown] - policies[key].nll_T[:shown]
            yield key._replace(policy=_DRAWN_GAIN), gain_T


def _nearest(steps_PT: Floats) -> int | None:
    """Return the policy whose differences from the last one take the fewest bits; None if there is no other."""
    *others_PT, last_T = steps_PT[:, :: max(1, steps_PT.shape[1] // _SAMPLE)]
    bits = [float(np.log2(1 + np.abs(other_T - last_T)).mean()) for other_T in others_PT]
    return min(range(len(bits)), key=lambda place: bits[place], default=None)


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


def rounded(value: Any) -> Any:
    """Round floats, and write an estimate as [value, low, high], for a small page."""
    if isinstance(value, dict):
        if value.keys() == {"value", "low", "high"}:
            return [rounded(number) for number in value.values()]
        return {name: rounded(inner) for name, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
    return value
