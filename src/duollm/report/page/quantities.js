// What a token can be coloured by, and the classes that tokens can be filtered to.

import { ownName, variantOf } from "./colour.js";
import { bigLayers, hasRoute, losses } from "./decode.js";

// The entry of a policy at the wanted budget or the nearest one; undefined if the policy was not measured.
export function findPolicy(domain, variant, k, context) {
  const mine = domain.policies.filter((one) => one.policy === variant && (!one.context || one.context === context));
  return mine.reduce((best, one) => (best && Math.abs(best.k - k) <= Math.abs(one.k - k) ? best : one), undefined);
}

export function choosable(domain, context) {
  const found = domain.policies.filter((one) => !/(^| · )drawn-/.test(one.policy) && (!one.context || one.context === context));
  return [...new Set(found.map((one) => one.policy))];
}

// All small and all big have no budget of their own: they can stand beside a policy of any.
export function isLevel(policy) {
  return /^all-/.test(ownName(policy.policy));
}

// The big layers per token that a policy spent on the text of its domain.
export function spentBy({ policy, k, domain }) {
  const row = domain.run.results.nll.find((one) => one.domain === domain.name && one.big_layers === k && variantOf(one) === ownName(policy));
  return row?.mean_big_layers ?? k;
}

// The policy that a measured one is compared with: of the same run and, if no other is given, at the same budget.
function beside(view, variant, k = view.policy.k) {
  const name = view.policy.policy.slice(0, -ownName(view.policy.policy).length) + variant;
  return view.domain.policies.find((one) => one.policy === name && one.k === k && (!one.context || one.context === view.context));
}

// By how much a policy lies below static at what it spent, as in Tables: between two budgets static lies on a line.
function gainOverStatic(view) {
  const { run } = view.policy.domain;
  const spent = run.branches.length > 2 ? view.policy.k : spentBy(view.policy);
  const possible = run.results.model.possible_big_layers ?? [Math.floor(spent), Math.ceil(spent)];
  const [below, above] = [Math.max(...possible.filter((k) => k <= spent)), Math.min(...possible.filter((k) => k >= spent))];
  const ends = [below, above].map((k) => beside(view, "static", k));
  const [low, high] = ends.every(Boolean) ? ends : [beside(view, "static"), beside(view, "static")];
  if (!low) return null;
  const share = low === high ? 0 : (spent - below) / (above - below);
  return losses(view.policy).map((value, t) => (1 - share) * losses(low)[t] + share * losses(high)[t] - value);
}

function predictableGain(view) {
  const predictor = beside(view, "ceiling", view.k);
  return predictor ? gainOverStatic({ ...view, policy: predictor }) : null;
}

function difference(first, second) {
  return first && second ? losses(first).map((value, t) => value - losses(second)[t]) : null;
}

// {label, help, diverging, good: whether above 0 is good, of(view)}; view: {domain, k, context, policy, other}.
// {cheapest} and {drawnFrom} in a text stand for what the run says, see `worded`.
export const QUANTITIES = {
  gain: { label: "gain over the fixed pattern", help: "loss of the best fixed pattern, at the budget that the policy spent, minus that of the policy", diverging: true, good: true, of: gainOverStatic },
  loss: { label: "loss of the policy", help: "nats", of: (v) => losses(v.policy) },
  small: { label: "loss, {cheapest}", help: "nats with the cheapest branch at every layer", of: (v) => losses(named(v, "all-small")) },
  big: { label: "loss, all big", help: "nats with every layer big", of: (v) => losses(named(v, "all-big")) },
  difficulty: { label: "difficulty", help: "loss of {cheapest} minus that of the oracle: what compute can remove", diverging: true, good: true, of: (v) => difference(named(v, "all-small"), named(v, "oracle")) },
  predictable: { label: "predictable gain", help: "loss of the best fixed pattern minus that of the best predictor found, which sees no label", diverging: true, good: true, of: predictableGain },
  above: { label: "policy minus hindsight", help: "loss of the policy minus that of the oracle at the same k", diverging: true, good: false, of: (v) => difference(v.policy, beside(v, "oracle")) },
  drawn: { label: "gain on a made-up label", help: "what the oracle's search gains on a label drawn from {drawnFrom}", diverging: true, good: true, of: (v) => (named(v, "drawn-gain") ? losses(named(v, "drawn-gain")) : null) },
  share: { label: "share of big layers", help: "big layers on the policy's route, of all layers", share: true, good: true, of: (v) => (v.policy.routes ? Float64Array.from({ length: v.domain.size }, (_, t) => (hasRoute(v.policy, t) ? bigLayers(v.policy, t) / v.policy.domain.layers : NaN)) : null) },
  other: { label: "policy minus the second", help: "loss of the policy minus that of the second policy", diverging: true, good: false, of: (v) => difference(v.policy, v.other) },
};

export function worded(text, run) {
  return text.replace("{cheapest}", run.cheapest).replace("{drawnFrom}", run.drawnFrom);
}

function named(view, variant) {
  return findPolicy(view.domain, variant, view.k, view.context);
}

export function quantile(values, share) {
  const sorted = Float64Array.from(values.filter((value) => !Number.isNaN(value))).sort();
  const place = share * (sorted.length - 1);
  const low = Math.floor(place);
  return sorted[low] + (place - low) * ((sorted[low + 1] ?? sorted[low]) - sorted[low]);
}

// The value at which a shade is full: nearly the largest, so that few extreme tokens do not pale all others.
export function fullAt(values, quantity) {
  return quantity.share ? 1 : quantile(values.map(Math.abs), 0.97) || 1;
}

export const CLASSES = {
  all: "all tokens",
  stuck: "high loss, gain below the median",
  helped: "high loss, gain above the median",
  easy: "other tokens",
};

// Return the class of every token: high loss is the top quarter under the cheapest policy, gain means above the median difficulty.
export function classify(view, highLoss) {
  const small = losses(named(view, "all-small"));
  const gain = QUANTITIES.difficulty.of(view);
  const [high, median] = [quantile(small, highLoss), quantile(gain, 0.5)];
  return Array.from(small, (loss, t) => (loss < high ? "easy" : gain[t] < median ? "stuck" : "helped"));
}
