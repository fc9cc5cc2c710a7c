"""The losses of an analysed run, as the last section of its model's card."""

from pathlib import Path
from typing import Any

from duollm.analysis.numbers import estimate
from duollm.analysis.policies import ALL_BIG, ALL_SMALL, EXECUTED, ORACLE, STATIC, variant
from duollm.analysis.results import headline_domain, main_context_rows
from duollm.files import write_text
from duollm.report.style import Row, policy_look, router_looks

_HEADING = "## Results"


def add_results(card: Path, results: dict[str, Any]) -> None:
    """Write the loss table of `results` (those of `analyse`) at the end of a card, in place of an older one."""
    text = card.read_text(encoding="utf-8").partition(f"\n{_HEADING}\n")[0].rstrip()
    write_text(card, f"{text}\n\n{_HEADING}\n\n{_results(results)}\n")


def _results(results: dict[str, Any]) -> str:
    domain = headline_domain(results)
    rows = [row for row in main_context_rows(results) if row["domain"] == domain]
    losses = {(variant(row), row["big_layers"]): row for row in rows}
    looks = router_looks(rows)
    layers = results["model"]["num_layers"]
    budgets = sorted({row["big_layers"] for row in rows if row["kind"]} or {k for _, k in losses if 0 < k < layers})
    table = [f"| nats per token, 95 % interval |{''.join(f' {k} big of {layers} |' for k in budgets)}"]
    table.append(f"|---|{'---|' * len(budgets)}")
    for policy in (STATIC, *looks, EXECUTED, ORACLE):
        cells = [losses.get((policy, k)) for k in budgets]
        if any(cells):
            look = looks.get(policy) or policy_look(policy)
            table.append(f"| {look.label} |{''.join(f' {_cell(cell)} |' for cell in cells)}")
    ends = [("all small", losses.get((ALL_SMALL, 0))), ("all big", losses.get((ALL_BIG, layers)))]
    measured = ", ".join(f"{name} {estimate(row, 'nll')}" for name, row in ends if row)
    return "\n".join([_what(results, domain, measured), "", *table])


def _what(results: dict[str, Any], domain: str, measured: str) -> str:
    tokens, documents = (sum(size[key] for size in results["data"].values()) for key in ("tokens", "documents"))
    text = f"{' and '.join(results['data'])}" if domain == "pooled" else domain
    return (
        f"On {tokens:,} tokens of {documents} held-out documents ({text}): {measured}. The oracle chooses with the "
        f'label in hand, in context "{results["context"]}"; its picks come from other passes unless executed together.'
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    spent = f" at {row['mean_big_layers']:.2f} big" if row["kind"] else ""
    return estimate(row, "nll") + spent
