// What is known of one token: its losses, its routes, and its loss over budgets; and pinned tokens side by side.

import { policyLabel, policyLook } from "./colour.js";
import { OF_RUN, bigLayers, branch, hasRoute, indexOf, lossAt, predictions } from "./decode.js";
import { count, el, number, oneLine, percent, svg } from "./dom.js";
import { CLASSES, QUANTITIES, choosable, findPolicy } from "./quantities.js";

const CELL = 9;
// Why another policy can have a lower loss on a token than the oracle, with no more big layers.
const CONTEXTS = {
  shared: "its routes were tried while all tokens took the same one; there the earlier tokens took routes of their own",
  reference: "its routes were tried after fixed reference routes of the earlier tokens; there they took others",
  committed: "its routes were tried after its own picks for the earlier tokens; there they took other routes",
};
const DECIMALS = 2; // as the page stores losses of tokens

export function routeStrip(policy, t, scrubbed) {
  const { layers } = policy.domain;
  const names = Array.from({ length: layers }, (_, l) => branch(policy, t, l));
  const picture = svg("svg", { class: "strip", width: layers * CELL + 1, height: 15, role: "img", "aria-label": `route ${names.join("")}, layer 0 first` });
  names.forEach((b, l) => picture.append(svg("rect", { x: l * CELL + 1, y: l === scrubbed ? 0 : 2, width: CELL - 1, height: l === scrubbed ? 15 : 11, class: `branch${b}` })));
  return picture;
}

export function placeOf(domain, t) {
  const window = indexOf(domain.window, t);
  return `${domain.documents[indexOf(domain.document, t)]}, position ${t - domain.window[window] + domain.position}`;
}

export function inspect(view, t, kinds, scrubbed) {
  const { domain, k, context } = view;
  const rows = choosable(domain, context).map((variant) => {
    const policy = findPolicy(domain, variant, k, context);
    const at = policy.k === k || /(^| · )all-/.test(variant) ? "" : ` (k = ${policy.k})`;
    const chosen = policy === view.policy || policy === view.other;
    const look = policyLook(variant, kinds);
    return el(
      "tr",
      { class: chosen ? "marked" : null, "data-policy": variant },
      el("th", { scope: "row" }, el("i", { style: `background:${look.colour}` }), policyLabel(variant, domain.run) + at),
      el("td", {}, number(lossAt(policy, t), DECIMALS)),
      el("td", {}, hasRoute(policy, t) ? [routeStrip(policy, t, scrubbed), ` ${bigLayers(policy, t)}`] : ""),
    );
  });
  const drawn = QUANTITIES.drawn.of(view);
  const [oracle, ...others] = ["oracle", ...choosable(domain, context).filter((one) => !one.includes(OF_RUN))].map((variant) => findPolicy(domain, variant, k, context));
  const beaten = oracle && others.some((one) => one.k === oracle.k && !(hasRoute(one, t) && bigLayers(one, t) > one.k) && lossAt(one, t) < lossAt(oracle, t));
  return [
    el("h3", { class: "token" }, el("bdi", {}, oneLine(domain.text[t]))),
    el("p", { class: "soft" }, placeOf(domain, t), el("br"), `Class: ${CLASSES[view.classes[t]]}`),
    predicted(domain, t),
    el("table", { class: "plain" }, el("thead", {}, el("tr", {}, ["policy", "loss", "route, big"].map((name) => el("th", { scope: "col" }, name)))), el("tbody", {}, rows)),
    beaten ? el("p", { class: "soft", id: "beaten" }, `Another row is below the oracle, for the two had different contexts: ${CONTEXTS[context]}${domain.run.search === "exact" ? "" : ", or took a route that was not tried"}.`) : null,
    sparkline(view, t, kinds),
    drawn ? el("p", { class: "soft" }, `On a label drawn from ${domain.run.drawnFrom} the oracle's search gains ${number(drawn[t], DECIMALS)} nats over the fixed pattern.`) : null,
  ].filter(Boolean);
}

function predicted(domain, t) {
  const found = predictions(domain, t);
  if (!found) return null;
  const words = found.top.map(([word, share], i) => el("li", { class: i + 1 === found.rank ? "hit" : null }, el("bdi", {}, oneLine(word)), el("small", {}, `${share} %`)));
  return el("div", {}, el("h4", {}, `What all big predicted: this token was its ${ordinal(found.rank)} guess`), el("ol", { class: "predicted" }, words));
}

function ordinal(n) {
  const teens = n % 100 > 10 && n % 100 < 14;
  return `${count(n)}${(!teens && ["th", "st", "nd", "rd"][n % 10]) || "th"}`;
}

// The token's loss over budgets, of the oracle and of static.
function sparkline(view, t, kinds) {
  const { domain, context } = view;
  const [width, height] = [230, 62];
  const lines = ["static", "oracle"].map((variant) => ({ variant, points: domain.policies.filter((p) => p.policy === variant && (!p.context || p.context === context)).map((p) => [p.k, lossAt(p, t)]) }));
  const values = lines.flatMap((line) => line.points.map((p) => p[1]));
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const x = (k) => 4 + (k / domain.layers) * (width - 8);
  const y = (v) => 5 + ((high - v) / (high - low || 1)) * (height - 10);
  const picture = svg("svg", { width, height, role: "img", "aria-label": `loss over budgets, from ${number(low, DECIMALS)} to ${number(high, DECIMALS)} nats` });
  picture.append(svg("line", { x1: x(view.k), x2: x(view.k), y1: 0, y2: height, class: "zero" }));
  for (const line of lines) picture.append(svg("polyline", { points: line.points.map(([k, v]) => `${x(k)},${y(v)}`).join(" "), fill: "none", stroke: policyLook(line.variant, kinds).colour, "stroke-width": 2 }));
  return el("div", { class: "spark" }, picture, el("small", {}, `loss over 0 … ${domain.layers} big layers: hindsight and fixed pattern, ${number(low, DECIMALS)} … ${number(high, DECIMALS)} nats`));
}

export function comparePins(view, pins, scrubbed, unpin) {
  const { domain } = view;
  const chosen = [view.policy, view.other].filter(Boolean);
  const ends = ["all-small", "all-big"].map((variant) => findPolicy(domain, variant, 0, view.context)).filter((policy) => !chosen.includes(policy));
  const lines = [
    ...ends.map((policy) => [policyLabel(policy.policy, domain.run), (t) => number(lossAt(policy, t), DECIMALS)]),
    ...chosen.flatMap((policy) => [
      [policyLabel(policy.policy, domain.run), (t) => number(lossAt(policy, t), DECIMALS)],
      ...(policy.routes ? [["its route", (t) => (hasRoute(policy, t) ? routeStrip(policy, t, scrubbed) : "–")], ["share of big", (t) => (hasRoute(policy, t) ? percent(bigLayers(policy, t) / policy.domain.layers) : "–")]] : []),
    ]),
  ];
  const head = pins.map((t) => el("th", { scope: "col" }, el("bdi", {}, oneLine(domain.text[t])), el("button", { type: "button", class: "unpin", "aria-label": `unpin token ${t}`, click: () => unpin(t) }, "×")));
  const body = lines.map(([name, of]) => el("tr", {}, el("th", { scope: "row" }, name), pins.map((t) => el("td", {}, of(t)))));
  return el("table", { class: "plain pins" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "pinned"), head)), el("tbody", {}, body));
}
