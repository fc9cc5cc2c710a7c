// The overview: what was studied, what was found, in words, and the verdicts on the claims.

import { policyLabel, variantOf } from "./colour.js";
import { byId, count, el, interval, number, pValue, percent, select, signed, withInterval } from "./dom.js";
import { frontier, gainOf, gainsChart } from "./frontier.js";
import { address, setState, state } from "./state.js";

export const MARKS = { reproduced: "✓", "not reproduced": "✗", undecided: "?", "not measured": "–", unstable: "~" };

export function chip(verdict) {
  return el("span", { class: `chip ${verdict.replace(" ", "-")}` }, `${MARKS[verdict]} ${verdict}`);
}

// A verdict with the estimate that decides it, and what was estimated unless the table says so.
export function decided({ verdict, quantity, estimate }, expected, ...more) {
  const number = estimate ? [" ", el("span", {}, withInterval(estimate)), quantity !== expected && el("small", {}, quantity)] : verdict === "undecided" && el("small", {}, "measured in part");
  return el("div", {}, chip(verdict), number, more);
}

export function judged({ quantity, conditions }) {
  const rule = conditions.find((one) => one.quantity === quantity)?.rule;
  return rule ? `${quantity} (reproduced if ${rule})` : quantity;
}

export function contextsOf(results) {
  return [...new Set(results.nll.filter((row) => row.policy === "oracle").map((row) => row.context))];
}

export function domainName(name) {
  return name === "pooled" ? "all domains" : name;
}

export function domainOptions(data) {
  const names = [...new Set(data.results.nll.map((row) => row.domain))];
  return names.map((name) => [name, domainName(name)]);
}

// Tokens and layers are shown of one text. A text that is chosen there or elsewhere holds in all views, but for all domains at once.
export function ofText(data, name) {
  const one = data.domains.some((domain) => domain.name === name);
  return { ...(one ? { domain: name } : {}), ...(one && state.pool === "pooled" ? {} : { pool: name }) };
}

export function textLabel() {
  return state.pool === "pooled" ? "Text (one at a time)" : "Text";
}

export function drawOverview(data) {
  byId("studied").replaceChildren(studied(data));
  const budgets = [...new Set(data.results.comparison.filter((row) => row.gain_over_static || row.gain_at_spent).map((row) => row.big_layers))];
  const ends = [0, data.layers];
  const k = budgets.includes(state.k) || ends.includes(state.k) ? state.k : nearest(budgets, state.k);
  const domain = state.pool;
  byId("overview-controls").replaceChildren(
    select("Text", domainOptions(data), domain, (value) => setState({ ...ofText(data, value), pool: value })),
    select("Big layers", [...new Set([...ends, ...budgets])].sort((a, b) => a - b).map((one) => [one, `${one} of ${data.layers}`]), k, (value) => setState({ k: Number(value) })),
    select("Context", contextsOf(data.results).map((one) => [one, one]), state.context, (value) => setState({ context: value })),
    select("Cost", [["layers", "big layers"], ["flops", "FLOPs"]], state.axis, (value) => setState({ axis: value })),
  );
  const facts = factsAt(data, domain, k, state.context);
  byId("answer").replaceChildren(...(ends.includes(k) ? onlyRoute(data, domain, k) : answer(data, facts, k)));
  byId("cards").replaceChildren(...cards(facts, data, domain));
  byId("gains").replaceChildren(gainsChart(data, domain));
  byId("frontier").replaceChildren(frontier(data, domain, state.context, state.axis));
  const own = claimsOn(data, domain);
  const open = own.filter((claim) => claim.verdict === "not measured");
  const counts = Object.keys(MARKS).map((verdict) => [own.filter((claim) => claim.verdict === verdict).length, verdict]);
  byId("verdict-count").textContent = counts.filter(([found]) => found).map((pair) => pair.join(" ")).join(", ");
  byId("verdicts").replaceChildren(...verdicts(own.filter((claim) => !open.includes(claim)), domain));
  byId("open-verdicts").hidden = !open.length;
  byId("open-count").textContent = `${open.length} claims that this run did not measure`;
  byId("open-list").replaceChildren(...verdicts(open, domain));
  return notMeasured(state.k, k);
}

// The claims as decided on a text; of all domains at once, a claim that was measured on one of them only stands with that one.
export function claimsOn({ results }, domain) {
  const elsewhere = (claim) => results.claims.find((one) => one.id === claim.id && one.verdict !== "not measured") ?? claim;
  const here = results.claims.filter((claim) => claim.domain === domain);
  return here.map((claim) => (domain === "pooled" && claim.verdict === "not measured" ? elsewhere(claim) : claim));
}

// The measured budget next to the wanted one.
export function nearest(budgets, k) {
  return budgets.reduce((best, one) => (Math.abs(one - k) < Math.abs(best - k) ? one : best), budgets[0]);
}

export function notMeasured(wanted, shown) {
  return wanted === shown ? "" : `Policies were not compared with ${wanted} big layers; this view shows the nearest measured budget, ${shown}.`;
}

// With no layer or every layer big all tokens take the same route.
function onlyRoute(data, domain, k) {
  const variant = k === 0 ? "all-small" : "all-big";
  const [loss] = data.results.nll.find((row) => row.domain === domain && row.policy === variant).nll;
  return [el("b", {}, `With ${k} of ${data.layers} layers big there is nothing to choose.`), ` Only one route exists, so every policy is ${policyLabel(variant, data)}, with a loss of ${number(loss)} nats. Choose a budget in between to see what choosing is worth.`];
}

function studied(data) {
  const { model } = data.results;
  const size = model.parameters ? ` with ${count(model.parameters)} parameters` : model.hidden_size ? ` of width ${count(model.hidden_size)}` : "";
  const trained = model.training_tokens ? `, trained on ${count(model.training_tokens)} tokens` : "";
  const texts = Object.entries(data.sizes).map(([name, one]) => `${count(one.tokens)} tokens of ${name} (${one.documents} documents)`);
  const tried = data.search === "exact" ? "Every route through it was tried" : `Routes through it were searched, but not all of them (${data.search}),`;
  const grouped = data.groups ? `Layers took their branch in ${data.groups.length} groups. ` : "";
  return `A language model of ${data.layers} layers${size}${trained}. At each layer a token can take a ${data.branches.join(" or a ")} branch; its choices at all layers are its route. ${grouped}${tried} on held-out text: ${texts.join(" and ")}.`;
}

// The numbers that the story is told with, at one budget; each is null if it was not measured.
export function factsAt(data, domain, k, context) {
  const { results } = data;
  const here = (row) => row.domain === domain && row.big_layers === k;
  const noise = results.selection_noise.find((row) => here(row) && row.context === context) ?? null;
  const routers = results.comparison.filter((row) => here(row) && row.kind && gainOf(row));
  const best = routers.sort((a, b) => gainOf(b)[0] - gainOf(a)[0])[0];
  const oracle = results.comparison.find((row) => here(row) && row.policy === "oracle" && row.context === context);
  const ceiling = results.ceiling.filter((row) => here(row) && row.chosen).sort((a, b) => b.gain[0] - a.gain[0])[0];
  const family = best && results.families.find((row) => row.domain === domain && row.router === variantOf(best));
  const p = family?.gain_p[family.big_layers.indexOf(k)];
  return { noise, oracle: noise?.gain ?? oracle?.gain_over_static ?? null, router: best && { name: variantOf(best), gain: gainOf(best), share: context === results.context ? best.of_oracle : undefined, p }, ceiling: ceiling ?? null };
}

function sign(estimate) {
  return estimate[1] > 0 ? 1 : estimate[2] < 0 ? -1 : 0;
}

// Whether a router's gain holds among those of all routers and budgets.
function stands({ p }) {
  return p === undefined || p <= 0.05;
}

// The finding in a sentence, and then how it came about.
function answer(data, { noise, oracle, router }, k) {
  if (!oracle) return ["The oracle's gain was not measured at this budget."];
  const real = noise && sign(noise.gain_beyond_drawn) > 0;
  const luck = !noise ? "How much of hindsight's gain is luck was not measured" : real ? "Choosing each token's route in hindsight gains more than luck alone would" : "Choosing each token's route in hindsight is not shown to gain more than luck";
  const much = router?.share ? `${percent(router.share[0], 1)} of that gain` : `${number(router?.gain[0])} nats`;
  const kept = !router ? "" : sign(router.gain) > 0 ? `; a router, which must decide beforehand, gets ${much}${stands(router) ? "" : ", which may be luck among all that were tried"}` : `; a router, which must decide beforehand, ${sign(router.gain) < 0 ? "loses against one fixed route for all tokens" : "is not shown to gain anything"}`;
  const parts = [` With ${k} of ${data.layers} layers big, hindsight lowers the loss by ${number(oracle[0])} nats against the best fixed route.`];
  if (noise) parts.push(`If the next tokens are made up, drawn from ${data.drawnFrom}, the same search gains ${percent(noise.gain_drawn[0] / noise.gain[0])} as much${real ? "; only the rest can speak for real differences between tokens" : ""}.`);
  return [el("b", {}, `${luck}${kept}.`), parts.join(" ")];
}

function scaleOf(data, domain) {
  const loss = (policy) => data.results.nll.find((row) => row.domain === domain && row.policy === policy).nll[0];
  const scale = loss("all-small") - loss("all-big");
  return `For scale: making all ${data.layers} layers big ${scale < 0 ? "raises" : "lowers"} the loss by ${number(Math.abs(scale))} nats against ${data.cheapest}.`;
}

function cards({ noise, oracle, router, ceiling }, data, domain) {
  const card = (kind, label, value, ...text) => el("div", { class: `card ${kind}` }, el("h2", {}, label), el("b", {}, value), text.map((one) => el("p", {}, one)));
  const found = [];
  if (oracle) found.push(card("oracle", "Choosing in hindsight gains", `${signed(oracle[0])} nats`, `${interval(oracle, signed)} over the fixed pattern. The oracle picks a token's route with the next token in hand.`, scaleOf(data, domain)));
  if (noise) {
    const worth = ["are worse than", "are not shown to differ from", "beat"][sign(noise.second_draw) + 1];
    const more = ["which is less than luck", "so it is not shown to be more than luck", "which is more than luck"][sign(noise.gain_beyond_drawn) + 1];
    const compared = `The text's gain minus this is ${withInterval(noise.gain_beyond_drawn, signed)} nats, ${more}.`;
    found.push(card("drawn", "The same search on made-up labels gains", `${signed(noise.gain_drawn[0])} nats`, `${interval(noise.gain_drawn, signed)}, by the luck of choosing among many routes. ${compared}`, `On a second made-up label those picks ${worth} the fixed pattern: ${withInterval(noise.second_draw, signed)}.`));
  }
  if (router) {
    const proven = sign(router.gain);
    const of = router.share && proven > 0 ? ` That is ${withInterval(router.share, (value) => percent(value, 1))} of the oracle's gain.` : "";
    const family = proven > 0 && router.p !== undefined ? ` Judged among all routers and budgets that were tried, it is ${stands(router) ? "" : "not "}shown to beat the fixed pattern here (p ${router.p < 0.001 ? "" : "= "}${pValue(router.p)}).` : "";
    const best = ceiling ? [`The best predictor found without the label, with k ${ceiling.spend === "exact" ? "layers big on every token" : "layers big on average"}, gained ${withInterval(ceiling.gain, signed)}.`] : [];
    const title = ["The best router loses", "The best router is not shown to gain", "The best router gains"][proven + 1];
    found.push(card("router", title, `${signed(router.gain[0])} nats`, `${interval(router.gain, signed)}, by router ${router.name}.${of}${family}`, ...best));
  }
  return found;
}

// What leaves a claim open that no measured condition leaves open.
export function unmeasured({ verdict, conditions }) {
  const open = verdict === "undecided" && conditions.every((one) => one.verdict !== "undecided");
  return open ? conditions.filter((one) => one.verdict === "not measured").map((one) => one.quantity) : [];
}

function verdicts(claims, domain) {
  const where = (claim) => [unmeasured(claim).length && "measured in part", claim.domain !== domain && `measured on ${claim.domain}`].filter(Boolean).join(", ");
  return claims.map((claim) => el("li", {}, el("a", { href: address({ view: "claims", claim: claim.id }), title: claim.finding }, claim.id), chip(claim.verdict), el("span", {}, `${claim.statement}${where(claim) && ` (${where(claim)})`}.`)));
}
