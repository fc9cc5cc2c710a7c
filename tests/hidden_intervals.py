"""Finds points of a chart whose intervals its picture does not show."""

import numpy as np
from matplotlib.collections import PolyCollection


def hidden_intervals(chart, figure):
    """Return the series of every point without an interval, or with one that is neither a band nor whiskers."""
    panels = [panel for line in chart.grid for panel in line]
    hidden = []
    for axes, panel in zip(figure.axes, panels, strict=True):
        paths = [(one, path.vertices) for one in axes.collections for path in one.get_paths()]
        # A band at a single x is there and cannot be seen.
        seen = [at for one, at in paths if not isinstance(one, PolyCollection) or np.ptp(at[:, 0]) > 0]
        ends = np.concatenate([[np.inf], *(at[:, 1] for at in seen)])
        for series in panel.series:
            for point in series.points:
                shown = all(np.abs(ends - end).min() < 1e-9 for end in (point.low, point.high))
                if not shown and point.low != point.high:
                    hidden.append(series.look.label)
    return hidden
