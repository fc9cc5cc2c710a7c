"""`duollm compare`: the comparison of one or several finished runs, from their results.json."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from duollm.analysis.results import headline_domain, read_results
from duollm.errors import UserError, did_you_mean
from duollm.report.comparison import as_markdown, as_text, columns_in_use, compared, comparison_lines
from duollm.report.terminal import print_table

_LEGEND = (
    "nats per token with 95 % intervals over documents; gains at equal spending, paired; FLOPs and time per token "
    "relative to all big, the router's own share in brackets; ! off the budget by more than 1 percentage point"
)


def print_comparison(runs: Sequence[Path], budgets: Sequence[int] | None, domain: str | None, form: str) -> None:
    """Print a table per budget; with several runs their policies stand one under the other.

    Args:
        budgets: numbers of big layers; None: all that were compared.
        domain: None: all pooled, or the only one.
        form: "table", "markdown" or "json" (the rows of `comparison` in docs/formats.md, each with its `run`).

    Raises:
        UserError: a folder without results, or a budget or domain that was not compared.
    """
    found = {_unique_name(run, runs): _read(run) for run in runs}
    chosen = {name: _domain(name, results, domain) for name, results in found.items()}
    wanted = _budgets(found, budgets)
    if form == "json":
        rows = [
            {"run": name, **row}
            for name, results in found.items()
            for row in results["comparison"]
            if row["domain"] == chosen[name] and row["big_layers"] in (0, *wanted, results["model"]["num_layers"])
        ]
        print(json.dumps(rows, indent=2))
        return
    for k in wanted:
        _print_budget(found, chosen, k, form)
    print(_LEGEND)
    for name, results in found.items():
        tokens, compared_tokens = (
            sum(size.get(key, 0) for size in results["data"].values()) for key in ("tokens", "compared_tokens")
        )
        if compared_tokens:
            print(
                f"{name}: gains of what sees no label on {compared_tokens:,} tokens, losses and oracles on {tokens:,}"
            )


def parse_budgets(text: str | None) -> list[int] | None:
    """Turn "4,6" into numbers; None stays None.

    Raises:
        UserError: `text` is something else.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in text.strip("[]").split(",")]
    except ValueError:
        raise UserError(f"--budget {text}: give numbers of big layers, such as 4,6") from None


def _print_budget(found: dict[str, dict[str, Any]], chosen: dict[str, str], k: int, form: str) -> None:
    lines = {
        name: comparison_lines(results, chosen[name], k) for name, results in found.items() if k in compared(results)
    }
    columns = columns_in_use([line for each in lines.values() for line in each])
    rows = []
    for name, each in lines.items():
        for line in each:
            run = {"run": name} if len(found) > 1 else {}
            rows.append({**run, "policy": line.name} | {column: as_text(line.cells[column]) for column in columns})
    texts = set(chosen.values())
    title = f"{k} big layers per token{f', {texts.pop()}' if len(texts) == 1 else ''}"
    if form == "markdown":
        print(f"### {title}\n\n{as_markdown(list(rows[0]), [list(row.values()) for row in rows])}\n")
    else:
        print_table(title, rows)


def _read(run: Path) -> dict[str, Any]:
    results = read_results(run)
    if "comparison" not in results:
        raise UserError(f"{run}: its results.json is of an older version; run `duollm report` on it again")
    return results


def _domain(name: str, results: dict[str, Any], domain: str | None) -> str:
    if domain is None:
        return headline_domain(results)
    known = dict.fromkeys(row["domain"] for row in results["comparison"])
    if domain not in known:
        raise UserError(f"--domain {domain}: not in run {name}; {did_you_mean(domain, known)}")
    return domain


def _budgets(found: dict[str, dict[str, Any]], budgets: Sequence[int] | None) -> list[int]:
    known = sorted({k for results in found.values() for k in compared(results)})
    for k in budgets or ():
        if k not in known:
            raise UserError(f"--budget {k}: was not compared; there are {', '.join(map(str, known)) or 'none'}")
    return sorted(set(budgets or known))


def _unique_name(run: Path, runs: Sequence[Path]) -> str:
    """Return the folder's own name, or the path as given if another run has the same name."""
    names = [other.resolve().name for other in runs]
    return str(run) if names.count(run.resolve().name) > 1 else run.resolve().name
