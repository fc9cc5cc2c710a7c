"""What a search of fewer routes would have found: sums over the counted tokens of each document (docs/formats.md).

Shape letters: D documents, N numbers of tries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from duollm.records.bootstrap import Floats, Integers
from duollm.records.files import KINDS, ResultFile
from duollm.records.keys import DRAWN_STATIC, STATIC, Key
from duollm.records.tokens import Tokens


@dataclass(frozen=True)
class Tries:
    """Losses at one budget, nats, had only so many random routes been tried.

    Attributes:
        tried: the numbers of routes, ascending; the last is all.
        labels: the numbers of drawn labels of a token by whose mean loss a route was chosen, ascending.
        sums: `text`, `expected`, and for each of `labels` `drawn1`, `second1`, ..., [D, N].
        static_D, expected_static_D: static on the text, and in expectation over drawn labels.
        counted_D: the tokens that were counted.
    """

    tried: list[int]
    labels: list[int]
    sums: dict[str, Floats]
    static_D: Floats
    expected_static_D: Floats
    counted_D: Integers


def read_tries(run: Path, oracle: Tokens) -> dict[int, Tries]:
    """Read oracle/<domain>.best_of.parquet, by budget; empty if the run did not measure drawn labels there."""
    path = run / "oracle" / f"{oracle.domain}{KINDS['best_of']}.parquet"
    if not (path.exists() and oracle.file.has("counted")):
        return {}
    file = ResultFile.open(path, "duollm oracle", path.parent)
    columns = {"text": "nll_sum"} | {
        name.removesuffix("_sum"): name
        for name in file.table.column_names
        if name.endswith("_sum") and not name.startswith("nll")
    }
    labels = sorted(int(name.removeprefix("drawn")) for name in columns if name.startswith("drawn"))
    if not labels:
        return {}
    names, own_document = file.documents()
    document = np.array([oracle.documents.index(name) for name in names])[own_document]
    big, drawn = file.integers("big_layers"), file.integers("drawn")
    counted_T = oracle.file.floats("counted")
    found = {}
    for k in np.unique(big).tolist():
        at_k = big == k
        tried, place = np.unique(drawn[at_k], return_inverse=True)
        sums = {name: np.zeros((len(oracle.documents), len(tried))) for name in columns}
        for name, sums_DN in sums.items():
            sums_DN[document[at_k], place] = file.floats(columns[name])[at_k]
        static_D, expected_D = (
            oracle.by_document(counted_T * oracle.policies[Key(policy, k)].nll_T) for policy in (STATIC, DRAWN_STATIC)
        )
        found[k] = Tries(
            tried.tolist(), labels, sums, static_D, expected_D, oracle.by_document(counted_T).astype(np.int64)
        )
    return found


def pool_tries(domains: Sequence[dict[int, Tries]]) -> dict[int, Tries]:
    """Put the documents of all domains side by side, at the budgets that every domain has."""
    first = domains[0]
    return {
        k: Tries(
            one.tried,
            one.labels,
            {name: np.concatenate([each[k].sums[name] for each in domains]) for name in one.sums},
            *(
                np.concatenate([getattr(each[k], name) for each in domains])
                for name in ("static_D", "expected_static_D", "counted_D")
            ),
        )
        for k, one in first.items()
        if all(k in each for each in domains)
    }
