// Claims, comparison, losses, further charts and the facts of the run.

import { lineChart } from "./chart.js";
import { drawDifficulty } from "./classes.js";
import { policyLabel, policyLook, routerKinds, variantOf } from "./colour.js";
import { byId, count, el, number, oneLine, pValue, percent, select, signed, withInterval } from "./dom.js";
import { PAIRED, gainOf, paired } from "./frontier.js";
import { placeOf } from "./inspector.js";
import { CLASSES, QUANTITIES, classify, quantile } from "./quantities.js";
import { scatterChart } from "./scatter.js";
import { address, setState, state } from "./state.js";
import { chip, claimsOn, decided, domainName, domainOptions, judged, nearest, notMeasured, ofText, unmeasured } from "./story.js";
import { plainTable, sortableTable } from "./table.js";

export function drawClaims(data) {
  const groups = Map.groupBy?.(data.results.claims, (claim) => claim.id) ?? grouped(data.results.claims);
  byId("claims-legend").hidden = !data.results.claims.some((claim) => claim.readings.length);
  const cards = [...groups].map(([id, claims]) => {
    const conditions = claims.flatMap((claim) => claim.conditions.map((one) => [domainName(claim.domain), one.quantity, one.rule, withInterval(one.estimate), chip(one.verdict)]));
    const rows = united(claims).map((claim) => el("li", {}, el("b", {}, domainName(claim.domain)), chip(claim.verdict), el("span", {}, claim.finding, leftOpen(claim))));
    const table = plainTable(["text", "quantity", "reproduced if", "measured", "verdict"], conditions);
    return el("article", { class: id === state.claim ? "claim chosen" : "claim", id: `claim-${id}` }, el("h2", {}, `${id}: ${claims[0].statement}`), sourceOf(claims[0]), el("ul", {}, rows), readingsOf(data, claims), el("details", {}, el("summary", {}, `All ${conditions.length} conditions`), table));
  });
  byId("claims").replaceChildren(...cards);
  if (state.claim) byId(`claim-${state.claim}`)?.scrollIntoView();
}

function leftOpen(claim) {
  const open = unmeasured(claim);
  return open.length ? ` Undecided only because this was not measured: ${open.join("; ")}.` : "";
}

// A finding that is the same on every text stands on one line.
function united(claims) {
  const same = claims.length > 1 && claims.every((claim) => claim.finding === claims[0].finding);
  return same ? [{ ...claims[0], domain: "every text" }] : claims;
}

function grouped(claims) {
  const groups = new Map();
  for (const claim of claims) groups.set(claim.id, [...(groups.get(claim.id) ?? []), claim]);
  return groups;
}

// "figure 4b: lowest at 6 of 12" is a place in the paper, with its own value; "arXiv ..." is another paper.
function sourceOf({ source }) {
  const [place, value] = source.split(": ");
  const number = place.match(/^arXiv (.+)/)?.[1];
  const where = number ? [el("a", { href: `https://arxiv.org/abs/${number}` }, place), ", a paper by others"] : [`Alizadeh et al., ${place}`, value && `; the paper's value: ${value}`];
  return el("p", { class: "soft" }, "Source: ", where);
}

const LABELS = { text: "labels of the text", drawn: "drawn labels", net: "net of selection noise" };

// The verdicts on a claim about the oracle, by context and labels; those of single texts fold away behind the main one.
function readingsOf(data, claims) {
  const [first, ...others] = claims.filter((claim) => claim.readings.length).sort((a, b) => (b.domain === data.headline) - (a.domain === data.headline));
  if (!first) return null;
  const more = others.length > 0 && el("details", {}, el("summary", {}, `The same table for ${others.map((claim) => domainName(claim.domain)).join(" and ")}`), others.map(readingsTable));
  return [readingsTable(first), more];
}

function readingsTable({ domain, conditions, readings }) {
  const [{ quantity }] = readings;
  const at = (context, labels) => readings.find((one) => one.context === context && one.labels === labels) ?? { verdict: "not measured" };
  const rows = [...new Set(readings.map((one) => one.context))].map((context) => [context, ...Object.keys(LABELS).map((labels) => decided(at(context, labels), quantity))]);
  return plainTable(["context", ...Object.values(LABELS)], rows, `${domainName(domain)}, ${judged({ quantity, conditions })}`);
}

export function drawTables(data) {
  const { results } = data;
  const budgets = [...new Set(results.comparison.filter((row) => !/^all-/.test(row.policy)).map((row) => row.big_layers))].sort((a, b) => a - b);
  const k = nearest(budgets, state.k);
  byId("table-controls").replaceChildren(
    select("Text", domainOptions(data), state.pool, (value) => setState({ ...ofText(data, value), pool: value })),
    select("Big layers", budgets.map((one) => [one, `${one} of ${data.layers}`]), k, (value) => setState({ k: Number(value) })),
  );
  const here = results.comparison.filter((row) => row.domain === state.pool && (row.big_layers === k || /^all-/.test(row.policy)) && !(row.policy === "executed-together" && row.context === "committed"));
  byId("comparison").replaceChildren(comparison(data, here, k));
  byId("losses").replaceChildren(lossTable(data));
  const families = results.families.filter((row) => row.domain === state.pool);
  byId("families").replaceChildren(...(families.length ? [familyTable(families)] : []));
  const spend = results.spend.filter((row) => row.domain === state.pool);
  byId("spend").replaceChildren(...(spend.length ? [spendTable(spend)] : []));
  return notMeasured(state.k, k);
}

function nameOf(row, data, several) {
  return policyLabel(variantOf(row), data) + (several && row.context ? `, ${row.context}` : "");
}

function lies(estimate, above, below) {
  return estimate?.[1] > 0 ? above : estimate?.[2] < 0 ? below : "";
}

function comparison(data, rows, k) {
  const several = new Set(rows.filter((row) => row.policy === "oracle").map((row) => row.context)).size > 1;
  const ofOracle = (row) => row.of_oracle ?? null;
  const ofPredictor = (row) => (row.kind ? (row.of_ceiling ?? null) : null);
  const share = (name, label, estimate) => ({ name, label, high: true, estimate, value: (row) => estimate(row)?.[0], form: (value) => percent(value, 1) });
  const relative = (name, own) => ({ value: (row) => row[name], text: (row) => (row[name] === undefined ? "–" : number(row[name]) + (row[own] === undefined ? "" : ` (router ${percent(row[own], 1)})`)) });
  const columns = [
    { name: "policy", label: "policy", text: (row) => nameOf(row, data, several), value: (row) => nameOf(row, data, several) },
    { name: "gain", high: true, label: "gain over fixed pattern", estimate: gainOf, value: (row) => gainOf(row)?.[0], form: (value) => signed(value, 4), mark: (row) => lies(gainOf(row), "better", "worse") },
    { name: "nll", label: "loss", estimate: (row) => row.nll, value: (row) => row.nll[0] },
    share("closed", "of oracle's gain", ofOracle),
    share("ceiling", "of predictor's gain", ofPredictor),
    { name: "share", label: "share of big", value: (row) => row.big_share, text: (row) => percent(row.big_share, 1) + (row.within_budget === false ? " (off budget)" : ""), mark: (row) => (row.within_budget === false ? "off" : "") },
    { name: "flops", label: "FLOPs", ...relative("relative_flops", "router_flops_share") },
    { name: "time", label: "time", ...relative("relative_time", "router_time_share") },
  ].filter((column) => column.name === "policy" || rows.some((row) => column.value(row) !== undefined && column.value(row) !== null));
  const marked = rows.map((row) => ({ ...row, marked: Boolean(row.kind) }));
  return sortableTable({ name: `comparison-k${k}`, caption: `${domainName(state.pool)}, ${k} of ${data.layers} layers big`, columns, rows: marked, sort: "gain" });
}

function lossTable(data) {
  const rows = data.results.nll.filter((row) => row.domain === state.pool);
  const name = (row) => nameOf(row, data, true);
  const columns = [
    { name: "policy", label: "policy", text: name, value: name },
    { name: "k", label: "k", text: (row) => String(row.big_layers), value: (row) => row.big_layers },
    { name: "spent", label: "big layers spent", text: (row) => number(row.mean_big_layers, 2), value: (row) => row.mean_big_layers },
    { name: "nll", label: "loss", estimate: (row) => row.nll, value: (row) => row.nll[0] },
    { name: "over", label: "above all big", estimate: (row) => row.over_all_big, value: (row) => row.over_all_big[0], form: (value) => signed(value) },
    { name: "perplexity", label: "perplexity", text: (row) => number(row.perplexity, 2), value: (row) => row.perplexity },
  ];
  return sortableTable({ name: `losses-${state.pool}`, caption: `${domainName(state.pool)}, ${count(rows[0]?.tokens ?? 0)} tokens`, columns, rows });
}

function familyTable(rows) {
  const beats = (row) => row.big_layers.filter((_, i) => row.gain_p[i] <= 0.05);
  const columns = [
    { name: "router", label: "router", text: (row) => row.router, value: (row) => row.router },
    { name: "area", high: true, label: "area", estimate: (row) => row.area, value: (row) => row.area?.[0], form: (value) => signed(value, 4), mark: (row) => lies(row.area, "better", "worse") },
    { name: "p", label: "p", text: (row) => pValue(row.area_p), value: (row) => row.area_p },
    { name: "beats", high: true, words: true, label: "beats fixed pattern at", text: (row) => beats(row).join(", ") || "none", value: (row) => beats(row).length },
    { name: "best", high: true, words: true, label: "may be best", text: (row) => (row.best_p === undefined ? "–" : row.best_p > 0.05 ? "yes" : "no"), value: (row) => row.best_p },
  ];
  return sortableTable({ name: "families", caption: `${domainName(state.pool)}, all budgets`, columns, rows, sort: "area" });
}

function spendTable(rows) {
  const columns = [
    { name: "kind", label: "router", text: (row) => row.kind, value: (row) => row.kind },
    { name: "k", label: "k", text: (row) => String(row.big_layers), value: (row) => row.big_layers },
    { name: "cost", label: "loss, exactly k minus k on average", estimate: (row) => row.exact_minus_average, value: (row) => row.exact_minus_average[0], form: (value) => signed(value, 4) },
  ];
  return sortableTable({ name: "spend", caption: "Above 0: it pays that the router decides how much each token gets.", columns, rows });
}

export function drawFigures(data) {
  byId("figure-controls").replaceChildren(select("Text", domainOptions(data), state.pool, (value) => setState({ ...ofText(data, value), pool: value })), state.pool === "pooled" ? el("span", { class: "soft" }, `Two charts show one text only, ${data.domains[0].name}: difficulty, and blind tries.`) : "");
  byId("charts").replaceChildren(...[noiseChart(data), unitsChart(data), partsChart(data), ceilingChart(data), bestOfChart(data), costChart(data), difficultyChart(data)].filter(Boolean));
  drawDifficulty(data);
  byId("files").replaceChildren(...(data.figures.length ? data.figures.map((figure) => paperFigure(data, figure)) : [el("li", {}, "They are drawn when the study ends.")]));
}

function paperFigure(data, { name, caption, claims, sample }) {
  const links = ["svg", "pdf", "csv"].flatMap((kind) => [el("a", { href: `${data.folder}/${name}.${kind}`, target: "_blank", rel: "noopener" }, kind.toUpperCase()), " "]);
  const decided = claimsOn(data, data.headline).filter((claim) => claims.includes(claim.id));
  const where = (claim) => (claim.domain === data.headline ? "" : ` on ${claim.domain}`);
  const chips = decided.flatMap((claim) => [el("a", { class: `chip ${claim.verdict.replace(" ", "-")}`, href: address({ view: "claims", claim: claim.id }), title: claim.statement }, `${claim.id} ${claim.verdict}${where(claim)}`), " "]);
  return el("li", {}, el("b", {}, `${name.replaceAll("_", " ")} `), ...links, el("small", {}, `${caption} ${sample}`), chips);
}

function chartOf(rows, lines, x, options) {
  if (!rows.length) return null;
  const series = lines.map(([field, name, colour]) => ({ name, colour, points: rows.map((row) => ({ x: row[x], y: row[field][0], low: row[field][1], high: row[field][2] })) }));
  series.push({ name: "fixed pattern", colour: "var(--soft)", dash: "2 3", level: true, points: [{ x: rows[0][x], y: 0 }] });
  return lineChart({ y: "gain over the fixed pattern (nats)", series, height: 280, ...options });
}

const MOST_POINTS = 3000;
const OUTSIDE = 0.005; // share of tokens at either end of the gains whose points stand at the edge; they would flatten all others

function difficultyChart(data) {
  const domain = data.domains.find((one) => one.name === state.pool) ?? data.domains[0];
  const view = { domain, k: data.budget, context: data.results.context };
  const [small, gain] = [QUANTITIES.small.of(view), QUANTITIES.difficulty.of(view)];
  const [low, high] = [quantile(gain, OUTSIDE), quantile(gain, 1 - OUTSIDE)];
  const kinds = classify(view, data.highLoss);
  const points = Array.from(small.keys())
    .filter((t) => t % Math.ceil(domain.size / MOST_POINTS) === 0)
    .map((t) => ({ t, x: small[t], y: Math.min(high, Math.max(low, gain[t])), group: kinds[t] }));
  const names = ["token", "document, position", "loss", "removed by the oracle", "class"];
  const rows = points.map(({ t, group }) => [oneLine(domain.text[t]), placeOf(domain, t), small[t], gain[t], CLASSES[group]]);
  const row = data.results.difficulty.find((one) => one.domain === domain.name && one.big_layers === data.budget);
  return scatterChart({
    title: `Difficulty against loss (${domain.name}, k = ${data.budget})`,
    name: `difficulty-${domain.name}`,
    x: `loss, ${data.cheapest} (nats)`,
    y: "what the oracle removes (nats)",
    points,
    rows: [names, ...rows],
    groups: { easy: { name: CLASSES.easy, colour: "var(--random)" }, helped: { name: CLASSES.helped, colour: "var(--oracle)" }, stuck: { name: CLASSES.stuck, colour: "var(--drawn)" } },
    marks: { x: quantile(small, data.highLoss), y: quantile(gain, 0.5) },
    describe: ({ t }) => [el("b", {}, el("bdi", {}, oneLine(domain.text[t]))), el("div", {}, `loss ${number(small[t], 2)}, of which the oracle removes ${number(gain[t], 2)}`)],
    choose: ({ t }) => setState({ view: "tokens", domain: domain.name, q: "difficulty", token: t }),
    note: row ? `${withInterval(row.hard_without_gain, (value) => percent(value))} of the high-loss tokens gain less than the median. Each point is a token; a click opens it in its text.` : "",
  });
}

function noiseChart(data) {
  const rows = data.results.selection_noise.filter((row) => row.domain === state.pool && row.context === state.context);
  const lines = [["gain", "hindsight (oracle), true labels", "var(--oracle)"], ["gain_drawn", "the same search, made-up labels", "var(--drawn)"], ["second_draw", "those picks on a second draw", "var(--executed)"]];
  return chartOf(rows, lines, "big_layers", { title: "How much does a peek at a label buy?", name: "selection-noise", x: "big layers per token", whole: true });
}

function unitsChart(data) {
  const rows = data.results.units.filter((row) => row.domain === state.pool && row.context === state.context && row.big_layers === data.budget);
  const lines = [["gain", "one route per unit, true labels", "var(--oracle)"], ["gain_drawn", "the same search, made-up labels", "var(--drawn)"], ["second_draw", "those picks on a second draw", "var(--executed)"]];
  return chartOf(rows, lines, "unit", { title: `What is left when neighbours share a route? (k = ${data.budget})`, name: "units", x: "tokens that share a route", log: true });
}

function partsChart(data) {
  const rows = data.results.decomposition.filter((row) => row.domain === state.pool && row.context === state.context);
  const lines = [["total", "oracle's gain", "var(--oracle)"], ["predictable", "best predictor found, k on every token", "var(--static)"], ["noise", "luck of a made-up label", "var(--drawn)"], ["rest", "rest", "var(--random)"]];
  return chartOf(rows, lines, "big_layers", { title: "What the oracle's gain is made of", name: "decomposition", x: "big layers per token", whole: true });
}

function ceilingChart(data) {
  const k = data.budget;
  const rows = data.results.ceiling.filter((row) => row.domain === state.pool && row.big_layers === k);
  const pick = (spend, shuffled) => rows.filter((row) => row.spend === spend && row.shuffled === shuffled).map((row) => ({ x: row.depth, y: row.gain[0], low: row.gain[1], high: row.gain[2] }));
  const series = [
    { name: `k on average`, colour: "var(--oracle)", points: pick("average", false) },
    { name: "k on every token", colour: "var(--static)", points: pick("exact", false) },
    { name: "control, fitted to other tokens", colour: "var(--random)", dash: "2 3", points: pick("average", true) },
  ].filter((one) => one.points.length);
  return series.length ? lineChart({ title: `From which layer on can routes be predicted? (k = ${k})`, name: "ceiling-by-depth", x: "last layer whose states are seen", whole: true, y: "gain over the fixed pattern (nats)", series, height: 280 }) : null;
}

function bestOfChart(data) {
  const domain = state.pool === "pooled" ? data.domains[0].name : state.pool;
  const series = [["best_of_patterns", "best of N fixed patterns", "var(--random)"], ["best_of_routes", "best of N routes per token", "var(--bestof)"]].flatMap(([field, name, colour]) => {
    const row = data.results[field].find((one) => one.domain === domain && one.big_layers === data.budget);
    if (!row) return [];
    const points = row.drawn.map((x, i) => ({ x, ...paired({ nll: row.nll[i], over_all_big: row.over_all_big[i] }) })).filter((p) => p.x <= data.randomRoutes);
    return [{ name, colour, points }];
  });
  for (const row of data.results.nll) {
    if (row.domain === domain && row.big_layers === data.budget && (row.kind ? row.spend !== "exact" : row.policy === "static")) {
      series.push({ name: policyLabel(variantOf(row), data), ...policyLook(variantOf(row), routerKinds(data.results)), level: true, points: [{ x: 1, ...paired(row) }] });
    }
  }
  return series.length ? lineChart({ title: `How many blind tries is it worth? (${domain}, k = ${data.budget})`, name: "best-of-draws", x: "drawn at random, N", y: "mean loss (nats per token)", series, height: 280, log: true, brackets: PAIRED }) : null;
}

function costChart(data) {
  const rows = data.results.comparison.filter((row) => row.domain === state.pool && row.relative_time !== undefined && (!row.context || row.context === state.context) && !/^all-/.test(row.policy));
  const groups = new Map();
  for (const row of rows) groups.set(variantOf(row), [...(groups.get(variantOf(row)) ?? []), row]);
  const series = [...groups].map(([variant, own]) => ({ name: policyLabel(variant, data), ...policyLook(variant, routerKinds(data.results)), points: own.map((row) => ({ x: row.relative_time, y: row.nll[0], note: `k = ${row.big_layers}`, label: String(row.big_layers) })) }));
  return series.length ? lineChart({ join: false, note: "Each point is a budget; the number beside it is k. Times are measured and vary by some percent from run to run: small steps along the axis are noise.", title: "Loss against measured time", name: "loss-by-time", x: "time per token, all big = 1", y: "mean loss (nats per token)", series, height: 280 }) : null;
}

export function drawRun(data) {
  const { model, context, bootstrap, provenance, timing } = data.results;
  const { machine, ...origin } = provenance;
  const groups = { Model: model, "Intervals and context": { context, ...bootstrap }, Origin: origin, Machine: machine, "Timing measurement": { ...timing, machine: {} } };
  const rows = Object.entries(groups).flatMap(([title, facts]) => {
    const own = flat(facts ?? {}, "").filter(([, value]) => `${value ?? ""}` !== "");
    return own.length ? [el("tr", {}, el("th", { colspan: 2, scope: "rowgroup" }, el("h2", {}, title))), ...own.map(([name, value]) => el("tr", {}, el("th", { scope: "row" }, name.replaceAll("_", " ").replaceAll(".", " ")), el("td", {}, fact(name, value))))] : [];
  });
  byId("facts").replaceChildren(...rows);
}

function fact(name, value) {
  if (name === "memory") return `${number(Number(value) / 2 ** 30, 1)} GiB`;
  return /^\d{5,}$/.test(value) ? count(Number(value)) : value;
}

function flat(value, name) {
  if (Array.isArray(value)) return [[name, value.join(" ")]];
  if (value === null || typeof value !== "object") return [[name, String(value)]];
  return Object.entries(value).flatMap(([key, inner]) => flat(inner, name ? `${name}.${key}` : key));
}
