"""Figures of the oracle's gain: selection noise, its parts, the ceiling, in every context, and by class of tokens."""

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any, TypeVar

from matplotlib.axes import Axes

from duollm.analysis.difficulty import LINE_START
from duollm.analysis.results import CeilingRow, DecompositionRow, NoiseRow, Results
from duollm.records.keys import AVERAGE, EXACT, EXECUTED, ORACLE
from duollm.report.chart import Chart, Panel, Point, Series, level, lines, whiskers
from duollm.report.style import GREY, Look, policy_look

_GAINS = {
    "gain": Look("oracle, true labels", "#0072B2", "o"),
    "gain_drawn": Look("the same search, drawn labels", "#D55E00", "D"),
    "second_draw": Look("the picks of drawn labels on a second draw", "#882255", "v"),
}
_EXPECTED = {"gain_expected": Look("a search by the expected loss of drawn labels", "#009E73", "s")}
_PARTS = {
    "predictable": Look("predicted, k on every token", "#009E73", "s"),
    "noise": Look("selection noise", "#D55E00", "D"),
    "rest": Look("rest", "#8c8c8c", "x"),
}
_TOTAL = Look("oracle's gain over static", "#0072B2", "o")
_BY_SPEND = {AVERAGE: Look("k on average", "#0072B2", "o"), EXACT: Look("k on every token", "#009E73", "s")}
_EARLIER = {
    "shared": "earlier tokens take the tried route",
    "reference": "earlier tokens take given routes",
    "committed": "earlier tokens take their picks",
}
"""What a context supposes while a token's routes are tried."""
_CONTEXTS = {
    "shared": Look("picks of context shared", "#56B4E9", "^"),
    "reference": Look("picks of context reference", "#009E73", "s", "--"),
    "committed": Look("picks of context committed", "#000000", "v", ":"),
}
_BY_CLASS = {name: _GAINS[name] for name in ("gain", "gain_drawn")} | {"gain_predicted": _PARTS["predictable"]}
_KINDS = {"form": "by form", "python": "by Python's tokenizer"}
_FEWEST = 20
"""Tokens of a class, at least, for it to be drawn."""
_BETWEEN = 0.2
"""Distance of the quantities of a class, as a share of that between classes."""
_BUDGET, _GAIN = "big layers per token", "gain over static (nats per token)"

Row = TypeVar("Row", NoiseRow, DecompositionRow)


def of_first_context(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of their first context, which is the main one if that was measured."""
    return [row for row in rows if row.context == rows[0].context]


def gains_by_budget(results: Results, domains: Sequence[str]) -> Chart:
    """Return the gains over static, with true and with drawn labels, against the budget, one panel per domain."""
    panels = []
    for domain in domains:
        rows = [row for row in of_first_context(results.selection_noise) if row.domain == domain]
        series = [
            lines(look, [Point.of(row.big_layers, getattr(row, quantity)) for row in rows])
            for quantity, look in _GAINS.items()
        ]
        panels.append(Panel(domain, _BUDGET, _GAIN, [level("static", 0), *series]))
    return Chart([panels], 5.4, 4.0, columns=2)


def gains_by_context(results: Results, domains: Sequence[str]) -> Chart | None:
    """Return the gains over static in all contexts side by side, one row per domain; None if there is only one context.

    The last column has the picks of every context, executed together.
    """
    contexts = list(dict.fromkeys(row.context for row in results.nll if row.policy == ORACLE and row.context))
    if len(contexts) < 2:
        return None
    return Chart([_side_by_side(results, domain, contexts) for domain in domains], 3.9, 3.5, columns=4)


def _side_by_side(results: Results, domain: str, contexts: Sequence[str]) -> list[Panel]:
    noise = [row for row in results.selection_noise if row.domain == domain]
    gains: dict[tuple[str, str | None], list[Point]] = {}
    for row in results.comparison:
        if row.domain == domain and row.gain_over_static:
            gains.setdefault((row.policy, row.context), []).append(Point.of(row.big_layers, row.gain_over_static))
    columns = []
    for context in contexts:
        here = [row for row in noise if row.context == context]
        oracle = [Point.of(row.big_layers, row.gain) for row in here] or gains.get((ORACLE, context), [])
        measured = [(_GAINS["gain"], oracle)]
        measured.append((_GAINS["gain_drawn"], [Point.of(row.big_layers, row.gain_drawn) for row in here]))
        if context != "committed":  # its picks were executed when they were found
            measured.append((policy_look(EXECUTED), gains.get((EXECUTED, context), [])))
        columns.append((f"{domain}, context {context}", f"{_BUDGET}\n({_EARLIER[context]})", measured))
    together = [(look, gains.get((EXECUTED, context), [])) for context, look in _CONTEXTS.items()]
    columns.append((f"{domain}, picks executed together", _BUDGET, together))
    points = [point for *_, measured in columns for _, points in measured for point in points]
    ends = [0, *(end for point in points for end in point[1:4] if isfinite(end))]
    scale: dict[str, Any] = {"x_range": (0, results.num_layers), "y_range": (1.05 * min(ends) - 0.02, 1.05 * max(ends))}
    panels = []
    for title, label, measured in columns:
        series = [lines(look, points) for look, points in measured if points]
        panels.append(Panel(title, label, _GAIN, [level("static", 0), *series], **scale))
    return panels


def gains_by_tries(results: Results, domain: str, budgets: Sequence[int]) -> Chart:
    """Return the gains over static against the number of random routes tried, one panel per budget."""
    panels = []
    for row in results.tries:
        if row.domain != domain or row.big_layers not in budgets:
            continue
        series = [
            lines(look, [Point.of(*pair) for pair in zip(row.tried, getattr(row, quantity), strict=True)])
            for quantity, look in (_GAINS | _EXPECTED).items()
        ]
        title, ticks = f"{domain}, k = {row.big_layers}", [10**power for power in range(len(str(row.tried[-1])))]
        panels.append(Panel(title, "routes tried, at random", _GAIN, [level("static", 0), *series], ticks=ticks))
    return Chart([panels], 4.4, 4.0, columns=2)


def parts_by_budget(results: Results, domains: Sequence[str]) -> Chart:
    """Return the parts of the oracle's gain against the budget, one panel per domain."""
    panels = []
    for domain in domains:
        rows = [row for row in of_first_context(results.decomposition) if row.domain == domain]
        series = [
            Series(look, [Point.of(row.big_layers, getattr(row, quantity)) for row in rows], form)
            for quantity, look, form in (*((*part, "bars") for part in _PARTS.items()), ("total", _TOTAL, "points"))
        ]
        panels.append(Panel(domain, _BUDGET, _GAIN, [level("static", 0), *series]))
    return Chart([panels], 5.4, 4.0, columns=5)


def gain_by_depth(results: Results, domains: Sequence[str], big_layers: int) -> Chart:
    """Return the ceiling's gain against the last layer that its predictor sees, at one budget."""
    panels = []
    for domain in domains:
        rows = [row for row in results.ceiling if (row.domain, row.big_layers) == (domain, big_layers)]
        series = [one for spend, look in _BY_SPEND.items() for one in _depths(rows, spend, look)]
        title = f"{domain}, k = {big_layers}"
        panels.append(Panel(title, "last layer whose states are seen", _GAIN, [level("static", 0), *series]))
    return Chart([panels], 5.4, 3.6)


def _depths(rows: Sequence[CeilingRow], spend: str, look: Look) -> list[Series]:
    fitted, shuffled = (
        [Point.of(row.depth, row.gain) for row in rows if (row.spend, row.shuffled) == (spend, control)]
        for control in (False, True)
    )
    control = Look(f"shuffled, {look.label}", look.colour, "x")
    return [*([lines(look, fitted)] if fitted else []), *([Series(control, shuffled, "points")] if shuffled else [])]


def gains_by_class(results: Results) -> Chart | None:
    """Return loss and gains of the classes of tokens, the most frequent first, one row per domain and kind of classes.

    None if there are no classes; rare ones are left out.
    """
    kinds = dict.fromkeys((row.domain, row.kind) for row in results.difficulty_by_class if row.kind in _KINDS)
    grid = [_loss_and_gains(results, domain, kind) for domain, kind in kinds]
    return Chart(grid, 5.2, 3.0) if grid else None


def _loss_and_gains(results: Results, domain: str, kind: str) -> list[Panel]:
    rows = [row for row in results.difficulty_by_class if row.domain == domain]
    everything = next(row for row in rows if row.kind == "all")
    classes = [row for row in rows if row.kind == kind and row.tokens >= _FEWEST]
    shown = [everything, *sorted(classes, key=lambda row: -row.tokens)]

    def series(quantity: str, look: Look) -> Iterator[Series]:
        estimates = [getattr(row, quantity) for row in shown]
        if all(estimates):  # not every run has a ceiling and drawn labels
            notes = [f"{row.name}, n = {row.tokens:,}" for row in shown]
            points = [Point.of(place, estimate) for place, estimate in enumerate(estimates)]
            named = [point._replace(note=note) for point, note in zip(points, notes, strict=True)]
            yield Series(look, named, "points")

    loss, k = Look(f"loss under {results.cheapest}", "#000000", "^"), everything.big_layers
    gains = [one for quantity, look in _BY_CLASS.items() for one in series(quantity, look)]
    title = f"{domain}, {_KINDS[kind]}"
    return [
        Panel(f"{title}: loss", "class", f"{loss.label} (nats)", list(series("nll_small", loss)), _draw_classes),
        Panel(f"{title}: gain", "class", f"gain over {results.cheapest} (nats), k = {k}", gains, _draw_classes),
    ]


def _draw_classes(axes: Axes, panel: Panel) -> None:
    """Draw values from left to right and classes from top to bottom, where their names have room; line starts bold."""
    axes.set(xlabel=panel.y, ylabel="")
    for place, series in enumerate(panel.series):
        apart = _BETWEEN * (place - (len(panel.series) - 1) / 2)
        values, places = [point.y for point in series.points], [point.x + apart for point in series.points]
        style: dict[str, Any] = series.look.style | {"linestyle": ""}
        axes.errorbar(values, places, xerr=whiskers(series.points), capsize=2, **style)
    first = panel.series[0].points
    axes.axvline(first[0].y, color=GREY, linestyle=":", label="all tokens (gain: true labels)")
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks([point.x for point in first], [point.note for point in first])
    for text in axes.get_yticklabels():
        text.set_fontweight("bold" if text.get_text().startswith(LINE_START) else "normal")
    axes.invert_yaxis()
