// The token explorer: text coloured by a quantity, with filters, search, pins and two policies side by side.

import { ownName, policyLabel, routerKinds, shade, variantOf } from "./colour.js";
import { OF_RUN, indexOf } from "./decode.js";
import { byId, count, el, number, oneLine, percent, select, signed, withInterval } from "./dom.js";
import { gainOf } from "./frontier.js";
import { comparePins, inspect } from "./inspector.js";
import { CLASSES, QUANTITIES, choosable, classify, findPolicy, fullAt, isLevel, spentBy, worded } from "./quantities.js";
import { setState, state } from "./state.js";
import { contextsOf, ofText, textLabel } from "./story.js";
import { TextView } from "./text.js";

const LISTED = 8;
const BEFORE = 3; // tokens shown before one that is listed
const MOST_PINS = 5;
const memory = { text: null, view: null, hits: [] };

function currentView(data) {
  const domain = data.domains.find((one) => one.name === state.domain) ?? data.domains[0];
  const at = (variant, k) => findPolicy(domain, variant, k, state.context);
  const policy = at(state.policy, state.k) ?? at("oracle", state.k);
  const k = isLevel(policy) ? state.k : policy.k; // so that all that the view compares has one budget
  const other = state.other === "none" ? undefined : at(state.other, k);
  return { domain, k, context: state.context, policy, other };
}

export function drawExplorer(data, changes = {}) {
  const view = currentView(data);
  const known = Object.keys(QUANTITIES).filter((id) => QUANTITIES[id].of(view));
  const id = known.includes(state.q) ? state.q : "loss";
  const quantity = QUANTITIES[id];
  const values = quantity.of(view);
  const classes = (view.classes = classify(view, data.highLoss));
  const kept = (t) => !Number.isNaN(values[t]) && (state.kind === "all" || classes[t] === state.kind) && (state.from === "" || values[t] >= Number(state.from)) && (state.to === "" || values[t] <= Number(state.to));
  Object.assign(memory, { view, data, hits: search(view.domain, state.find) });
  // The field that is being typed in keeps its element; all other controls follow the state.
  if (!("find" in changes || "from" in changes || "to" in changes)) controls(data, view, known, id);
  byId("legend").replaceChildren(...legend(values, quantity, data));
  byId("counted").replaceChildren(...counted(view, kept, values), ...(id === "gain" ? inTables(view) : []));
  byId("extremes").replaceChildren(...extremes(view, kept));
  const full = fullAt(values, quantity);
  const many = data.page.runs.length > 1;
  const spent = (policy) => (number(spentBy(policy), 2) === number(policy.k, 2) ? "" : `, spends ${number(spentBy(policy), 2)}`);
  const nameOfPane = (policy) => `${many && policy.domain === view.domain ? data.name + OF_RUN : ""}${policyLabel(policy.policy, data)}, k = ${policy.k}${spent(policy)}`;
  const pane = (policy, of) => ({ policy, of, name: nameOfPane(policy), colour: (t) => shade(of[t], full, quantity.diverging, quantity.good) });
  const panes = [pane(view.policy, values)];
  if (view.other && id !== "other") panes.push(pane(view.other, quantity.of({ ...view, policy: view.other }) ?? values));
  if (panes.length > 1 && panes[0].of.every((value, t) => Object.is(value, panes[1].of[t]))) byId("counted").append(` ${quantity.label[0].toUpperCase()}${worded(quantity.label, data).slice(1)} does not depend on the policy, so both sides have the same colours; only routes and losses differ.`);
  const hits = new Set(memory.hits.flatMap(([from, to]) => Array.from({ length: to - from }, (_, i) => from + i)));
  const paint = { panes, dim: (t) => !kept(t), found: (t) => hits.has(t), layer: state.layer, lanes: state.lanes === "on" };
  if (view.other && id === "other") panes[0].name += ` minus ${nameOfPane(view.other)}`;
  byId("panenames").replaceChildren(...panes.map(({ name }) => el("b", {}, name)));
  byId("panenames").className = panes.length > 1 ? "panes two" : "panes";
  showText(view, paint, data);
  if ("view" in changes && state.token >= 0) requestAnimationFrame(() => memory.text.reveal(state.token));
  showToken(state.token);
  return noteOf(view);
}

// What is not as it was asked for: budgets that a policy was not measured at, and text that the page does not hold.
function noteOf({ domain, k, policy, other }) {
  const label = (one) => policyLabel(one.policy, domain.run);
  const parts = [];
  if (k !== state.k) parts.push(`${label(policy)} was not measured with ${state.k} big layers; this view shows it with ${k}.`);
  if (other && !isLevel(other) && other.k !== k) parts.push(`${label(other)}, beside it, was not measured with ${k} big layers and is shown with ${other.k}.`);
  if (domain.size < domain.tokens) parts.push(`The page holds the text of the first ${count(domain.size)} of ${count(domain.tokens)} tokens of ${domain.name}; tables and charts count all of them.`);
  return parts.join(" ");
}

function showText(view, paint, data) {
  if (memory.text?.domain === view.domain) {
    memory.text.pins = state.pins;
    memory.text.repaint(paint);
    return;
  }
  memory.text?.close();
  const holder = byId("text");
  memory.text = new TextView(holder, view.domain, paint);
  memory.text.pins = state.pins;
  if (!holder.dataset.bound) bind(holder, data);
  if (state.token >= 0 && state.token < view.domain.size && location.hash.includes("token=")) requestAnimationFrame(() => memory.text.reveal(state.token));
}

function bind(holder) {
  holder.dataset.bound = "yes";
  byId("close-token").addEventListener("click", () => focusToken(-1));
  const under = (event) => {
    const lanes = event.target.closest?.("svg.lanes");
    if (lanes) {
      const box = lanes.getBoundingClientRect();
      return Number(lanes.dataset.from) + Math.floor(((event.clientX - box.left) / box.width) * lanes.viewBox.baseVal.width);
    }
    const word = event.target.closest?.("[data-t]");
    return word ? Number(word.dataset.t) : null;
  };
  holder.addEventListener("pointermove", (event) => {
    const t = under(event);
    if (t !== null && t !== state.token) focusToken(t);
  });
  holder.addEventListener("click", (event) => {
    const t = under(event);
    if (t !== null && !String(getSelection())) togglePin(t);
  });
  holder.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, PageDown: 64, PageUp: -64 }[event.key];
    if (step) {
      const t = Math.min(memory.view.domain.size - 1, Math.max(0, (state.token < 0 ? -1 : state.token) + step));
      focusToken(t);
      memory.text.reveal(t);
    } else if (event.key === "Enter" && state.token >= 0) togglePin(state.token);
    else return;
    event.preventDefault();
  });
}

// Pointing happens often, so it changes the card and the mark only and does not draw the view again.
function focusToken(t) {
  state.token = t;
  memory.text.focus(t);
  showToken(t);
}

export function togglePin(t) {
  const others = state.pins.filter((pin) => pin !== t);
  const pins = others.length < state.pins.length ? others : [...state.pins, t].slice(-MOST_PINS);
  setState({ pins, token: t });
}

function showToken(t) {
  const { view, data } = memory;
  const known = t >= 0 && t < view.domain.size;
  document.querySelector("aside").classList.toggle("idle", !known);
  const hint = el("p", { class: "soft" }, "Point at a token, or move through the text with the arrow keys. A click or Enter pins a token to compare.");
  byId("token").replaceChildren(...(known ? inspect(view, t, routerKinds(data.results), state.layer) : [hint]));
  const pins = state.pins.filter((pin) => pin < view.domain.size);
  byId("pinned").replaceChildren(...(pins.length ? [comparePins(view, pins, state.layer, togglePin)] : []));
}

function controls(data, view, known, id) {
  const names = choosable(view.domain, state.context).map((variant) => [variant, policyLabel(variant, data)]);
  const every = Array.from({ length: data.layers + 1 }, (_, k) => k);
  const measured = view.domain.policies.filter((one) => one.policy === view.policy.policy).map((one) => one.k);
  const budgets = every.filter((k) => isLevel(view.policy) || measured.includes(k)).map((k) => [k, `${k} of ${data.layers}`]);
  const field = (label, key, type, extra = {}) => el("label", { class: "control" }, el("span", {}, label), el("input", { "aria-label": label, type, value: state[key], input: (event) => setState({ [key]: event.target.value }), ...extra }));
  const layer = el("input", { "aria-label": "Layer", type: "range", min: -1, max: data.layers - 1, value: state.layer, "aria-valuetext": state.layer < 0 ? "no layer" : `layer ${state.layer}`, input: (event) => setState({ layer: Number(event.target.value) }) });
  const keep = document.activeElement?.closest?.("#text-controls .control");
  const place = keep ? [...byId("text-controls").children].indexOf(keep) : -1;
  byId("text-controls").replaceChildren(
    select(textLabel(), data.domains.map((one) => [one.name, one.name]), view.domain.name, (value) => setState({ ...ofText(data, value), token: -1, pins: [] })),
    select("Colour", known.map((one) => [one, worded(QUANTITIES[one].label, data)]), id, (value) => setState({ q: value, from: "", to: "" })),
    select("Policy", names, view.policy.policy, (value) => setState({ policy: value })),
    select("Big layers", budgets, view.k, (value) => setState({ k: Number(value) })),
    select("Beside it", [["none", "nothing"], ...names], view.other?.policy ?? "none", (value) => setState({ other: value })),
    select("Context", contextsOf(data.results).map((one) => [one, one]), state.context, (value) => setState({ context: value })),
    select("Tokens", Object.entries(CLASSES), state.kind, (value) => setState({ kind: value })),
    field("Value from", "from", "number", { step: "0.1" }),
    field("Value to", "to", "number", { step: "0.1" }),
    field("Search", "find", "search", { placeholder: "text", keydown: (event) => event.key === "Enter" && jump(event.shiftKey ? -1 : 1) }),
    documents(view.domain),
    select("Lanes", [["on", "shown"], ["off", "hidden"]], state.lanes, (value) => setState({ lanes: value })),
    el("label", { class: "control" }, el("span", {}, state.layer < 0 ? "Layer: none" : `Layer: ${state.layer}`), layer),
  );
  const all = el("button", { type: "button", class: "more", click: () => byId("text-controls").classList.toggle("all") }, "More or fewer choices");
  byId("text-controls").append(all);
  if (place >= 0) byId("text-controls").children[place]?.querySelector("input,select")?.focus();
}

function documents(domain) {
  const names = domain.documents.map((name, i) => [i, name]);
  const at = state.token >= 0 && state.token < domain.size ? indexOf(domain.document, state.token) : -1;
  return select("Go to document", [...(at < 0 ? [[-1, "choose"]] : []), ...names], at, (value) => {
    const first = domain.document[value];
    focusToken(first);
    memory.text.reveal(first);
  });
}

function legend(values, quantity, data) {
  const full = fullAt(values, quantity);
  const stops = Array.from({ length: 9 }, (_, i) => (quantity.diverging ? (i - 4) / 4 : i / 8) * full);
  const form = quantity.share ? (value) => percent(value) : (value) => number(value, 2);
  const cells = stops.map((value) => el("i", { style: `background:${shade(value, full, quantity.diverging, quantity.good)}` }));
  return [el("b", {}, worded(quantity.label, data)), el("span", { class: "scale" }, form(stops[0]), el("span", { class: "ramp" }, cells), `${form(stops[8])}${quantity.share ? "" : " nats or more"}`), el("small", {}, worded(quantity.help, data)), state.lanes === "on" ? el("span", { class: "scale" }, "lanes:", data.branches.flatMap((name) => [el("i", { class: `key ${name}` }), name])) : ""];
}

function search(domain, wanted) {
  if (!wanted) return [];
  const text = domain.text.join("").toLowerCase();
  const starts = [];
  let length = 0;
  for (const piece of domain.text) {
    starts.push(length);
    length += piece.toLowerCase().length;
  }
  const hits = [];
  let t = 0;
  for (let at = text.indexOf(wanted.toLowerCase()); at >= 0; at = text.indexOf(wanted.toLowerCase(), at + 1)) {
    while (t + 1 < starts.length && starts[t + 1] <= at) t++;
    let end = t + 1;
    while (end < starts.length && starts[end] < at + wanted.length) end++;
    hits.push([t, end]);
  }
  return hits;
}

function counted(view, kept, values) {
  let [chosen, sum] = [0, 0];
  values.forEach((value, t) => kept(t) && (chosen++, (sum += value)));
  const all = view.domain.size;
  const parts = [el("span", {}, `${count(chosen)} of ${count(all)} tokens (${percent(chosen / all)}), mean ${number(chosen ? sum / chosen : null)}`)];
  if (state.find) parts.push(el("span", {}, `; “${state.find}” found ${count(memory.hits.length)} times `), ...(memory.hits.length ? [el("button", { type: "button", click: () => jump(1) }, "next"), el("b", { id: "hit" }, "Enter: next, Shift+Enter: previous")] : []));
  return parts;
}

// Goes to the next or the previous place that the search found, and says which one it is and whether it began again.
function jump(step) {
  const { hits } = memory;
  if (!hits.length) return;
  const next = step > 0 ? hits.findIndex(([from]) => from > state.token) : hits.findLastIndex(([from]) => from < state.token);
  const place = next >= 0 ? next : step > 0 ? 0 : hits.length - 1;
  const around = next < 0 && state.token >= 0;
  focusToken(hits[place][0]);
  memory.text.reveal(hits[place][0]);
  byId("hit").textContent = `${count(place + 1)} of ${count(hits.length)}${around ? (step > 0 ? ", from the start again" : ", from the end again") : ""}`;
}

// The mean gain over the whole text of the comparison, of which the page may hold a part only.
function inTables({ policy, context }) {
  const { name, run } = policy.domain;
  const row = run.results.comparison.find((one) => one.domain === name && one.big_layers === policy.k && variantOf(one) === ownName(policy.policy) && (!one.context || one.context === context));
  const gain = gainOf(row);
  return gain ? [el("span", {}, `; over all ${count(row.gain_tokens)} compared tokens, as in Tables: ${withInterval(gain, (value) => signed(value, 4))}`)] : [];
}

// The rows that are kept and lie at either end of the order, best first; sorting all of them would be slow.
function ends(values, kept) {
  const sorted = Float64Array.from(values.filter((_, t) => kept(t))).sort();
  const [low, high] = [sorted[LISTED - 1] ?? Infinity, sorted.at(-LISTED) ?? -Infinity];
  const rows = Array.from(values.keys()).filter((t) => (values[t] <= low || values[t] >= high) && kept(t));
  return rows.sort((a, b) => values[b] - values[a]);
}

// The tokens that the policy helps most and least against static, among those that the filter keeps.
function extremes(view, kept) {
  const gain = QUANTITIES.gain.of(view);
  if (!gain) return [];
  const rows = ends(gain, (t) => kept(t) && !Number.isNaN(gain[t]));
  const list = (title, chosen) => {
    const items = chosen.map((t) => el("li", {}, el("button", { type: "button", click: () => (focusToken(t), memory.text.reveal(t)) }, el("span", {}, el("small", {}, oneLine(view.domain.text.slice(Math.max(0, t - BEFORE), t).join(""))), el("bdi", {}, oneLine(view.domain.text[t]))), el("small", {}, number(gain[t], 2)))));
    return el("div", {}, el("h4", {}, title), el("ol", {}, items));
  };
  return [list("helped most", rows.slice(0, LISTED)), list("helped least", rows.slice(-LISTED).reverse())];
}
