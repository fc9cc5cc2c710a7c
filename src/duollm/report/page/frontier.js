// The frontier: mean loss of every policy against what it spends.

import { policyLabel, policyLook, routerKinds, variantOf } from "./colour.js";
import { lineChart } from "./chart.js";

export const PAIRED = "Brackets: 95 % interval of the difference from all big, drawn about all big.";

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

// A line's name, short enough to stand at the line.
function atEnd(name) {
  return name.replace(/^hindsight, | \(oracle\)|, mean$| found/g, "").replace(/^router \((.*)\)$/, "$1");
}

function withEnds(series) {
  return series.map((one) => ({ ...one, end: atEnd(one.name) }));
}

export function frontier(data, domain, context, axis) {
  return lineChart({
    title: "Loss against what is spent",
    name: `frontier-${domain}-${context}`,
    x: axis === "flops" ? "FLOPs per token, all big = 1" : `big layers per token, of ${data.layers}`,
    y: "mean loss (nats per token)",
    series: withEnds(frontierLines(data, domain, context, axis)),
    height: 310,
    whole: axis !== "flops",
    note: axis === "flops" ? flopsNote(data) : "",
    brackets: PAIRED,
  });
}

function flopsNote({ results }) {
  const counted = [...new Set(results.comparison.filter((row) => row.relative_flops !== undefined && !/^all-/.test(row.policy)).map((row) => row.big_layers))];
  return `FLOPs were counted with ${counted.sort((a, b) => a - b).join(", ")} big layers only; other budgets, and policies whose FLOPs were not counted, are not drawn.`;
}

// The gain over static that every view quotes, at what the policy spent; null for what it is measured against.
export function gainOf(row) {
  const ends = ["static", "all-small", "all-big"];
  return !row || ends.includes(row.policy) ? null : (row.gain_at_spent ?? row.gain_over_static ?? null);
}

// What the frontier draws as one thick line: how far the policies lie from the fixed pattern, without hindsight's far larger gain.
export function gainsChart(data, domain) {
  const kinds = routerKinds(data.results);
  const series = new Map();
  const add = (variant, x, [y, low, high]) => {
    if (!series.has(variant)) series.set(variant, { name: policyLabel(variant, data), ...policyLook(variant, kinds), off: /, exact$/.test(variant), points: [] });
    series.get(variant).points.push({ x, y, low, high });
  };
  for (const row of data.results.comparison) {
    const gain = gainOf(row);
    if (row.domain === domain && row.kind && gain) add(variantOf(row), row.mean_big_layers ?? row.big_layers, gain);
  }
  for (const row of data.results.ceiling) if (row.domain === domain && row.chosen && row.spend !== "exact") add("ceiling", row.mean_big_layers, row.gain);
  if (!series.size) return "";
  series.set("static", { name: policyLabel("static", data), ...policyLook("static", kinds), level: true, points: [{ x: [...series.values()][0].points[0].x, y: 0 }] });
  return lineChart({ title: "Gain over the fixed pattern, without hindsight", name: `gains-${domain}`, x: `big layers per token, of ${data.layers}`, y: "gain (nats per token)", series: withEnds([...series.values()]), height: 260, whole: true });
}

function keyOf(row) {
  return [row.domain, row.policy, row.big_layers, row.context ?? ""].join("|");
}
