// Which layers are big: by depth, and by depth and position in the window, counted on the tokens of the page.

import { chosenLines, heatMap, lineChart } from "./chart.js";
import { isRouter, policyLabel, policyLook, routerKinds, variantOf } from "./colour.js";
import { branch, indexOf } from "./decode.js";
import { byId, el, percent, select } from "./dom.js";
import { CLASSES, choosable, classify, findPolicy } from "./quantities.js";
import { setState, state } from "./state.js";
import { contextsOf, ofText, textLabel } from "./story.js";

const BINS = 8;
const EXACT = /, exact$/; // so like the router that spends on average that both would hide each other

export function drawLayers(data) {
  const domain = data.domains.find((one) => one.name === state.domain) ?? data.domains[0];
  const variants = choosable(domain, state.context).filter((one) => domain.policies.some((p) => p.policy === one && p.routes && p.domain === domain));
  const only = variants.includes(state.map) ? state.map : null;
  byId("layer-controls").replaceChildren(
    select(textLabel(), data.domains.map((one) => [one.name, one.name]), domain.name, (value) => setState(ofText(data, value))),
    select("Context", contextsOf(data.results).map((one) => [one, one]), state.context, (value) => setState({ context: value })),
    select("Maps of", [["all", "every policy"], ...variants.map((one) => [one, `${policyLabel(one, data)}, by class`])], only ?? "all", (value) => setState({ map: value })),
    only ? "" : select("Tokens", Object.entries(CLASSES), state.kind, (value) => setState({ kind: value })),
  );
  const budgets = shownBudgets(data, domain);
  drawAlike("depth", budgets.map((k) => depthChart(data, domain, k)));
  byId("maps").replaceChildren(...(only ? rowsOfClasses(data, domain, only, budgets) : variants.map((variant) => mapRow(policyLabel(variant, data), mapsOf(data, domain, variant, state.kind, budgets)))));
  drawAlike("agreement", budgets.map((k) => agreementChart(data, k)).filter(Boolean));
}

// Charts of the same policies stand under one legend.
function drawAlike(id, charts) {
  const shared = chosenLines(charts.flatMap((one) => one.series));
  byId(id).replaceChildren(shared.legend, ...charts.map((one) => lineChart({ ...one, shared })));
}

// The budgets of the routers, or a third, a half and two thirds of the layers without any.
function shownBudgets(data, domain) {
  const own = [...new Set(domain.policies.filter((one) => isRouter(one.policy) && one.domain === domain).map((one) => one.k))];
  const most = 4;
  const wanted = own.length ? own : [data.layers / 3, data.layers / 2, (2 * data.layers) / 3].map(Math.round);
  return wanted.sort((a, b) => a - b).filter((_, i) => i % Math.ceil(wanted.length / most) === 0);
}

function depthChart(data, domain, k) {
  const rows = data.results.layer_use.filter((row) => row.domain === domain.name && row.big_layers === k);
  const kinds = routerKinds(data.results);
  const series = rows.map((row) => {
    const variant = variantOf(row);
    const points = row.share_by_layer.map(([y, low, high], x) => ({ x, y, low, high }));
    return { name: policyLabel(variant, data), ...policyLook(variant, kinds), off: EXACT.test(variant), points };
  });
  series.push({ name: "even use", colour: "var(--soft)", dash: "2 3", level: true, points: [{ x: 0, y: k / data.layers }] });
  return { title: `${k} big layers`, name: `layers-${domain.name}-k${k}`, x: "layer (0 is the first)", y: "share of tokens that are big", series, height: 230, whole: true };
}

function mapsOf(data, domain, variant, kind, budgets) {
  return budgets.map((k) => mapOf(data, domain, variant, kind, k)).filter(Boolean);
}

// One policy, a row for each class of tokens; all have one scale, so that classes can be compared.
function rowsOfClasses(data, domain, variant, budgets) {
  const rows = Object.entries(CLASSES).map(([kind, name]) => [name, mapsOf(data, domain, variant, kind, budgets)]);
  const end = strongest(rows.flatMap(([, maps]) => maps));
  return rows.map(([name, maps]) => mapRow(name, maps, end));
}

function mapOf(data, domain, variant, kind, k) {
  const policy = findPolicy(domain, variant, k, state.context);
  if (!policy || policy.k !== k) return null;
  const classes = kind === "all" ? null : classify({ domain, k, context: state.context, policy }, data.highLoss);
  const longest = Math.max(...domain.window.map((start, w) => (domain.window[w + 1] ?? domain.size) - start));
  const bins = Math.min(BINS, longest);
  const [tokens, big] = [new Array(bins).fill(0), Array.from({ length: data.layers }, () => new Array(bins).fill(0))];
  for (let t = 0; t < domain.size; t++) {
    if (classes && classes[t] !== kind) continue;
    const bin = Math.floor(((t - domain.window[indexOf(domain.window, t)]) / longest) * bins);
    tokens[bin]++;
    for (let l = 0; l < data.layers; l++) big[l][bin] += branch(policy, t, l) === 2;
  }
  const values = big.map((row) => row.map((sum, bin) => (tokens[bin] ? sum / tokens[bin] - k / data.layers : 0)));
  return { domain, variant, k, values, even: k / data.layers };
}

function strongest(maps) {
  return Math.max(0.05, ...maps.flatMap((one) => one.values.flat().map(Math.abs)));
}

// Each policy has its own scale, for most of them differ far less from even use than a fixed pattern does.
function mapRow(title, maps, end = strongest(maps)) {
  const ramp = Array.from({ length: 9 }, (_, i) => el("i", { style: `background:rgb(var(${i > 4 ? "--warm" : "--cool"}) / ${Math.abs(i - 4) / 4})` }));
  const scale = el("span", { class: "scale" }, percent(-end), el("span", { class: "ramp" }, ramp), `+${percent(end)}`);
  return el("div", { class: "maprow" }, el("h3", {}, title, " ", scale), el("div", { class: "maps" }, maps.map((one) => drawMap(one, end))));
}

function drawMap({ domain, variant, k, values, even }, end) {
  const describeCell = (layer, bin, value) => `k = ${k}, layer ${layer}, part ${bin + 1} of ${values[0].length} of the window: ${percent(value + even)} big`;
  const title = `${policyLabel(variant, domain.run)}, ${k} big layers: share of big by layer and position`;
  const caption = el("figcaption", { "aria-live": "polite" }, `k = ${k}`);
  const told = (cell) => (caption.textContent = cell ?? `k = ${k}`);
  return el("figure", {}, heatMap({ values, end, title, rowName: "layer", columnName: "position →", describeCell, told }), caption);
}

function agreementChart(data, k) {
  const kinds = routerKinds(data.results);
  const rows = data.results.agreement.filter((row) => row.domain === data.headline && row.big_layers === k);
  if (!rows.length) return null;
  const series = rows.flatMap((row) => {
    const variant = variantOf(row);
    const look = policyLook(variant, kinds);
    const chance = row.share_if_independent_by_layer.map((y, x) => ({ x, y }));
    return [
      { name: policyLabel(variant, data), ...look, off: EXACT.test(variant), points: row.share_by_layer.map(([y, low, high], x) => ({ x, y, low, high })) },
      { name: `${variant}, by chance`, ...look, dash: "1 4", off: EXACT.test(variant), points: chance },
    ];
  });
  return { title: `${k} big layers`, name: `agreement-k${k}`, x: "layer (0 is the first)", y: "on the oracle's branch", series, height: 230, whole: true };
}
