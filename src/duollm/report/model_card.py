"""Adds the losses of an analysed run to its model's card, as the last section."""

from pathlib import Path

from duollm.analysis.results import LossRow, Results
from duollm.files import write_text
from duollm.records.bootstrap import with_interval
from duollm.records.keys import ALL_BIG, ALL_SMALL, EXECUTED, ORACLE, STATIC
from duollm.report.style import policy_look, router_looks

_HEADING = "## Results"


def add_results(card: Path, results: Results) -> None:
    """Append the loss table of `results` to a card, in place of an older table."""
    text = card.read_text(encoding="utf-8").partition(f"\n{_HEADING}\n")[0].rstrip()
    write_text(card, f"{text}\n\n{_HEADING}\n\n{_results(results)}\n")


def _results(results: Results) -> str:
    rows = [row for row in results.main_nll if row.domain == results.headline]
    losses, looks, layers = {(row.variant, row.big_layers): row for row in rows}, router_looks(rows), results.num_layers
    budgets = sorted({row.big_layers for row in rows if row.kind} or {k for _, k in losses if 0 < k < layers})
    table = [f"| nats per token, 95 % interval |{''.join(f' {k} big of {layers} |' for k in budgets)}"]
    table.append(f"|---|{'---|' * len(budgets)}")
    for policy in (STATIC, *looks, EXECUTED, ORACLE):
        cells = [losses.get((policy, k)) for k in budgets]
        if any(cells):
            look = looks.get(policy) or policy_look(policy)
            table.append(f"| {look.label} |{''.join(f' {_cell(cell)} |' for cell in cells)}")
    ends = [(results.cheapest, losses.get((ALL_SMALL, 0))), ("all big", losses.get((ALL_BIG, layers)))]
    measured = ", ".join(f"{name} {with_interval(row.nll)}" for name, row in ends if row)
    tokens, documents = (sum(getattr(size, key) for size in results.data.values()) for key in ("tokens", "documents"))
    text = (
        f"On {tokens:,} tokens of {documents} held-out documents ({' and '.join(results.domains)}): {measured}. "
        f'The oracle chooses with the label in hand, in context "{results.context}"; its picks come from other passes '
        "unless executed together."
    )
    return "\n".join([text, "", *table])


def _cell(row: LossRow | None) -> str:
    if row is None:
        return "-"
    return with_interval(row.nll) + (f" at {row.mean_big_layers:.2f} big" if row.kind else "")
