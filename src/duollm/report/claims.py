"""`duollm claims`: the verdicts of one or several runs on the claims, as one table."""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from string import ascii_uppercase
from textwrap import fill
from typing import Any, Self, get_args

from duollm.analysis.claims.models import BY_TASKS
from duollm.analysis.claims.runs import Column, Run, columns_of, notes_on, studies_of
from duollm.analysis.verdicts import Claim, Labels, Verdict, over_seeds
from duollm.errors import UserError
from duollm.records.bootstrap import with_interval
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


def print_claims(folders: Sequence[Path], domain: str | None, form: str, out: Path | None = None) -> None:
    """Decide the claims and print a row for every one, as `ClaimTable.decide` and `ClaimTable.show` do.

    Args:
        out: a folder for the figure of C14 and C15, if dense or frozen runs were scored.

    Settings in which runs differ more than they must are named on standard error.
    """
    table = ClaimTable.decide(folders, domain)
    for note in table.notes:
        print(f"note: {note}", file=sys.stderr)
    if out:
        table.write_figure(out)
    table.show(form)


@dataclass(frozen=True)
class ClaimTable:
    """Every claim, decided by one or several runs.

    Attributes:
        folders: the runs.
        domain: what was asked for: a domain, or all pooled.
        studies: the columns of each study; several are seeds of it.
        notes: settings in which runs differ more than they must.
    """

    folders: Sequence[Path]
    domain: str
    columns: Sequence[Column]
    studies: Sequence[Sequence[Column]]
    decided: "Sequence[Decided]"
    notes: Sequence[str]

    @classmethod
    def decide(cls, folders: Sequence[Path], domain: str | None = None) -> Self:
        """Read the runs and decide.

        Args:
            folders: runs: seeds of a study, and the runs that some claims need beside it (docs/claims.md).
            domain: name of a domain. None for all pooled, or the only one; a claim that is not measured there is
                shown for another domain.

        Raises:
            UserError: a folder is no finished run, the runs do not fit together, or there is no such domain.
        """
        columns, without_place = columns_of([Run.read(folder) for folder in folders])
        if not columns:
            raise UserError(
                f"{folders[0]}: only stands beside a study (dense or frozen); give the run of the study too"
            )
        studies = studies_of(columns)
        main = columns[0].main
        assert main.results
        asked = main.results.domain_of(main.folder, domain)
        notes = list(notes_on(studies, without_place))
        return cls(folders, asked, columns, studies, list(_claims(studies, asked, domain is None)), notes)

    def write_figure(self, folder: Path) -> None:
        """Write the figure of C14 and C15, if dense or frozen runs were scored."""
        from duollm.report.loss_figures import write_duo_and_dense

        write_duo_and_dense(self.columns, folder)

    def show(self, form: str) -> None:
        """Print it as "table", "json" or "csv"."""
        if form == "json":
            print(json.dumps([_nested(decided) for decided in self.decided], indent=2))
            return
        if form == "csv":
            rows = [_flat(decided) for decided in self.decided]
            writer = csv.DictWriter(sys.stdout, list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)
            return
        rows_shown = [_row(decided, self.domain) for decided in self.decided]
        print_table(f"{self.domain}: {', '.join(map(str, self.folders))}", rows_shown, WIDTH)
        if len(self.studies) > 1:
            firsts = [study[0].main.folder for study in self.studies]
            letters = (f"{letter}: {first}" for letter, first in zip(ascii_uppercase, firsts, strict=False))
            print(fill(f"Studies, the one that decides a claim first: {', '.join(letters)}", WIDTH))
        contexts = dict.fromkeys(reading.context for decided in self.decided for reading in decided.claim.readings)
        for line in _LEGEND:
            print(fill(line.format(contexts=", ".join(contexts) or "none"), WIDTH))


def claims_together(folders: Sequence[Path]) -> dict[str, list[Claim]]:
    """Return the claims as all runs together decide them, by domain; empty if the runs are not of one study.

    A study has a run for each seed, or several that measure different parts of it.
    """
    runs = [Run.read(folder) for folder in folders]
    columns = columns_of(runs)[0] if all(run.results for run in runs) else []
    studies = studies_of(columns)
    if len(studies) != 1 or len({column.seed for column in columns}) < len(columns):
        return {}
    main = columns[0].main.results
    assert main
    return {
        domain: [claim for _, (claim, _) in _of_study(columns, domain, domain == main.headline)]
        for domain in dict.fromkeys([*main.domains, main.headline])
    }


@dataclass(frozen=True)
class Decided:
    """A claim over all seeds of the study that decides it.

    Attributes:
        seeds: of each study that measured it, by its first run, the verdict of each seed; the deciding one first.
        names: of the seeds of the deciding study.
        letters: of the studies in `seeds`; empty if only one study was given.
    """

    claim: Claim
    seeds: dict[str, list[Verdict]]
    names: list[str]
    letters: str

    @property
    def study(self) -> str:
        """The first run of the study that decides it."""
        return next(iter(self.seeds))


def _claims(studies: Sequence[Sequence[Column]], domain: str, elsewhere: bool) -> Iterator[Decided]:
    """Yield every claim, decided by the first study that measures it in full, or else by the first that measures it."""
    letters = ascii_uppercase if len(studies) > 1 else ""
    found = [dict(_of_study(study, domain, elsewhere)) for study in studies]
    for name in sorted({name for claims in found for name in claims}):
        have = [place for place, claims in enumerate(found) if name in claims]
        have.sort(key=lambda place: _unmeasured(found[place][name][0]))  # the sort is stable
        have = [place for place in have if _unmeasured(found[place][name][0]) < 2] or have[:1]
        seeds = {str(studies[place][0].main.folder): found[place][name][1] for place in have}
        names = [_name(column, studies[have[0]]) for column in studies[have[0]]]
        shown = "".join(letters[place] for place in have) if letters else ""
        yield Decided(found[have[0]][name][0], seeds, names, shown)


def _unmeasured(claim: Claim) -> int:
    """Rank a claim: measured in full, in part, not at all."""
    measured = [one.estimate is not None for one in claim.conditions]
    return 0 if all(measured) else 1 if any(measured) else 2


def _of_study(
    study: Sequence[Column], domain: str, elsewhere: bool
) -> Iterator[tuple[tuple[int, bool], tuple[Claim, list[Verdict]]]]:
    """Yield every claim over the seeds of a study, with its verdict in each; one by tasks has a row of its own."""
    by_column = [{(claim.id, claim.domain): claim for claim in column.claims()} for column in study]
    known = sorted({place for claims in by_column for place in claims})
    for name, by_tasks in dict.fromkeys((name, place == BY_TASKS) for name, place in known):
        others = [place for other, place in known if other == name and place != BY_TASKS] if elsewhere else []
        found = {
            place: [claims[name, place] for claims in by_column if (name, place) in claims]
            for place in ([BY_TASKS] if by_tasks else [domain, *others])
        }
        decided = [seeds for seeds in found.values() if seeds]
        measured = (seeds for seeds in decided if any(seed.verdict != "not measured" for seed in seeds))
        if not decided:  # the study has no such domain
            continue
        seeds = next(measured, decided[0])
        yield (int(name[1:]), by_tasks), (over_seeds(seeds), [seed.verdict for seed in seeds])


def _row(decided: Decided, domain: str) -> dict[str, Cell]:
    claim = decided.claim
    decided_by = claim.finding if claim.verdict == "not measured" else f"{claim.quantity}: {_rule(claim)}"
    of_studies = [" ".join(_MARKS[each] for each in seeds) for seeds in decided.seeds.values()]
    marks = ["".join(pair) for pair in zip_longest(decided.letters, of_studies, fillvalue="")]
    verdict = " ".join([claim.verdict, *(marks if len(decided.names) > 1 or decided.letters else [])])
    where = "" if claim.domain in (domain, BY_TASKS) else f" ({claim.domain})"
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


def _nested(decided: Decided) -> dict[str, Any]:
    own = decided.seeds[decided.study]
    more = {"seeds": own, "study": decided.study}
    others = {name: seeds for name, seeds in decided.seeds.items() if name != decided.study}
    return asdict(decided.claim) | more | {"other_studies": others}


def _flat(decided: Decided) -> dict[str, Cell]:
    claim = decided.claim
    estimate = asdict(claim.estimate) if claim.estimate else {}
    names = ("id", "domain", "statement", "source", "verdict", "quantity")
    readings = {f"{one.labels} {one.context}": one.verdict for one in claim.readings}
    seeds = dict(zip(decided.names, decided.seeds[decided.study], strict=False))
    row = {name: getattr(claim, name) for name in names} | {"rule": _rule(claim)} | estimate
    return row | seeds | {"study": decided.study} | readings


def _rule(claim: Claim) -> str:
    return next(one.rule for one in claim.conditions if one.quantity == claim.quantity)


def _name(column: Column, columns: Sequence[Column]) -> str:
    seeds = [one.seed for one in columns]
    return f"seed {column.seed}" if len(set(seeds)) == len(seeds) else column.main.folder.resolve().name
