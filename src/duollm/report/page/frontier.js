// The frontier: mean loss of every policy against what it spends.

import { policyLabel, policyLook, routerKinds, variantOf } from "./colour.js";
import { lineChart } from "./chart.js";

// The interval of a mean mostly shows how documents differ, which moves all policies together. The band is the interval
// of the difference from all big instead, put where all big stands.
export function paired(row) {
  const big = row.nll[0] - row.over_all_big[0];
  return { y: row.nll[0], low: big + row.over_all_big[1], high: big + row.over_all_big[2] };
}

export function frontierLines(data, domain, context, axis) {
  const { results } = data;
  const cost = new Map(results.comparison.map((row) => [keyOf(row), row.relative_flops]));
  const kinds = routerKinds(results);
  const series = new Map();
  for (const row of results.nll) {
    if (row.domain !== domain || /^oracle-ramp|^ceiling-shuffled/.test(row.policy)) continue;
    if (["oracle", "executed-together"].includes(row.policy) && row.context !== context) continue;
    if (row.policy === "executed-together" && row.context === "committed") continue; // equals its oracle
    const variant = variantOf(row);
    const level = variant === "all-small" || variant === "all-big";
    const x = axis === "flops" ? cost.get(keyOf(row)) : row.mean_big_layers;
    if (x === undefined && !level) continue;
    if (!series.has(variant)) {
      const off = /^best-of|, exact$|-exact$/.test(variant);
      series.set(variant, { variant, name: policyLabel(variant, data), ...policyLook(variant, kinds), level, off, points: [] });
    }
    const note = row.kind ? `at ${row.mean_big_layers.toFixed(2)} big layers` : "";
    series.get(variant).points.push({ x: x ?? (variant === "all-big" ? 1 : 0), ...paired(row), note });
  }
  if (axis === "flops") for (const one of series.values()) if (one.level && !one.points.some((p) => p.x > 0)) one.points[0].x = 1;
  return [...series.values()];
}

export function frontier(data, domain, context, axis) {
  return lineChart({
    title: "Loss against what is spent",
    name: `frontier-${domain}-${context}`,
    x: axis === "flops" ? "FLOPs per token, all big = 1" : `big layers per token, of ${data.layers}`,
    y: "mean loss (nats per token)",
    series: frontierLines(data, domain, context, axis),
    height: 380,
  });
}

function keyOf(row) {
  return [row.domain, row.policy, row.big_layers, row.context ?? ""].join("|");
}
