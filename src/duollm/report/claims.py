"""`duollm claims`: the verdicts of one or several runs on the claims, as one table."""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill
from typing import get_args

from duollm.analysis.claims.runs import Column, Run, columns_of, over_seeds
from duollm.analysis.verdicts import Claim, Labels, Verdict
from duollm.errors import UserError, did_you_mean
from duollm.records.numbers import with_interval
from duollm.terminal import Cell, print_table

WIDTH = 100
_MARKS: dict[Verdict, str] = {
    **{"reproduced": "+", "not reproduced": "\N{MINUS SIGN}", "undecided": "?"},
    **{"not measured": "\N{MIDDLE DOT}", "unstable": "~"},
}
_LEGEND = (
    "Estimates with 95 % intervals; over several seeds their mean, with an interval over documents and seeds.",
    "Behind a verdict: that of each seed. + reproduced, \N{MINUS SIGN} not reproduced, ? undecided, \N{MIDDLE DOT} not "
    "measured, ~ unstable: differs between seeds.",
    "text, drawn, net: claims about the oracle, in the contexts {contexts}: on the labels of the text; on labels drawn "
    "from the model, of which nothing about the text can be learned; and net of this selection noise.",
    "Definitions: docs/claims.md",
)


def print_claims(folders: Sequence[Path], domain: str | None, form: str) -> None:
    """Print a row for every claim.

    Args:
        folders: runs: seeds of a study, and the runs that some claims need beside it (docs/claims.md).
        domain: name of a domain. None for all pooled, or the only one; a claim that is not measured there is shown for
            another domain.
        form: "table", "json" or "csv".

    Raises:
        UserError: a folder is no finished run, the runs do not fit together, or there is no such domain.
    """
    columns = columns_of([Run.read(folder) for folder in folders])
    if not columns:
        raise UserError(f"{folders[0]}: only stands beside a study (dense or frozen); give the run of the study too")
    main = columns[0].main
    assert main
    assert main.results
    known = [*main.results.data, *(["pooled"] if len(main.results.data) > 1 else [])]
    if domain is not None and domain not in known:
        raise UserError(f"domain {domain}: not in {main.folder}; {did_you_mean(domain, known)}")
    asked = domain or main.results.headline
    claims = list(_claims(columns, asked, domain is None))
    if form == "json":
        print(json.dumps([asdict(claim) | {"seeds": seeds} for claim, seeds in claims], indent=2))
        return
    if form == "csv":
        names = [_name(column, columns) for column in columns]
        rows = [_flat(claim) | dict(zip(names, seeds, strict=False)) for claim, seeds in claims]
        writer = csv.DictWriter(sys.stdout, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        return
    title = f"{asked}: {', '.join(map(str, folders))}"
    print_table(title, [_row(claim, seeds if len(columns) > 1 else [], asked) for claim, seeds in claims], WIDTH)
    contexts = dict.fromkeys(reading.context for claim, _ in claims for reading in claim.readings)
    for line in _LEGEND:
        print(fill(line.format(contexts=", ".join(contexts) or "none"), WIDTH))


def _claims(columns: Sequence[Column], domain: str, elsewhere: bool) -> Iterator[tuple[Claim, list[Verdict]]]:
    """Yield every claim over all seeds, with its verdict in each."""
    by_column = [{(claim.id, claim.domain): claim for claim in column.claims()} for column in columns]
    for name in sorted({name for claims in by_column for name, _ in claims}, key=lambda name: int(name[1:])):
        others = {place for claims in by_column for other, place in claims if other == name} if elsewhere else ()
        found = {
            place: [claims[name, place] for claims in by_column if (name, place) in claims]
            for place in (domain, *sorted(others))
        }
        measured = (place for place, seeds in found.items() if any(seed.verdict != "not measured" for seed in seeds))
        seeds = found[next(measured, domain)]
        yield over_seeds(seeds), [seed.verdict for seed in seeds]


def _row(claim: Claim, seeds: Sequence[Verdict], domain: str) -> dict[str, Cell]:
    decided_by = claim.finding if claim.verdict == "not measured" else f"{claim.quantity}: {_rule(claim)}"
    verdict = " ".join([claim.verdict, *(_MARKS[each] for each in seeds)])
    where = "" if claim.domain == domain else f" ({claim.domain})"
    return {
        "": claim.id,
        "claim, and what decides it": f"{claim.statement}{where} [{claim.source}]\n{decided_by}\n",
        "verdict, estimate": f"{verdict}\n{with_interval(claim.estimate) if claim.estimate else ''}",
        **{labels: _marks(claim, labels) for labels in get_args(Labels)},
    }


def _marks(claim: Claim, labels: Labels) -> str:
    """A mark for every context; contexts that have no drawn labels have none either."""
    found = {one.context: _MARKS[one.verdict] for one in claim.readings if one.labels == labels}
    contexts = dict.fromkeys(one.context for one in claim.readings)
    return " ".join(found.get(context, _MARKS["not measured"]) for context in contexts)


def _flat(claim: Claim) -> dict[str, Cell]:
    estimate = asdict(claim.estimate) if claim.estimate else {}
    names = ("id", "domain", "statement", "source", "verdict", "quantity")
    readings = {f"{one.labels} {one.context}": one.verdict for one in claim.readings}
    return {name: getattr(claim, name) for name in names} | {"rule": _rule(claim)} | estimate | readings


def _rule(claim: Claim) -> str:
    return next(one.rule for one in claim.conditions if one.quantity == claim.quantity)


def _name(column: Column, columns: Sequence[Column]) -> str:
    seeds = [one.seed for one in columns]
    assert column.main
    return f"seed {column.seed}" if len(set(seeds)) == len(seeds) else column.main.folder.resolve().name
