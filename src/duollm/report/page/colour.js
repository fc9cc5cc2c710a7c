// Names and colours of policies (Okabe and Ito, safe for the colour-blind; page.css holds lighter ones for dark mode).

import { OF_RUN } from "./decode.js";

const FIXED = {
  oracle: ["hindsight (oracle)", "--oracle", ""],
  "executed-together": ["hindsight, executed together", "--executed", ""],
  static: ["fixed pattern", "--static", ""],
  "random-patterns": ["random patterns, mean", "--random", ""],
  ceiling: ["best predictor found", "--ceiling", ""],
  "ceiling-exact": ["best predictor found, exact", "--ceiling", "5 3"],
  "ceiling-shuffled": ["control of the predictor", "--ceiling", "1 4"],
  "ceiling-shuffled-exact": ["control of the predictor, exact", "--ceiling", "1 4"],
  "all-small": [null, "--ink", "2 3"], // the run says what to call it
  "all-big": ["all big", "--ink", "7 4"],
  "drawn-oracle": ["hindsight on a made-up label", "--drawn", ""],
};
const ROUTERS = 6;

// The name of a policy without that of the run that it is a guest from.
export function ownName(variant) {
  return variant.split(OF_RUN).pop();
}

export function isRouter(variant) {
  return !(variant in FIXED) && !/^(best-of|oracle-|ceiling|drawn-)/.test(variant);
}

export function policyLabel(given, run) {
  const variant = ownName(given);
  if (variant !== given) {
    const name = given.slice(0, -variant.length - OF_RUN.length);
    return name + OF_RUN + policyLabel(variant, run.page.runs.find((other) => other.name === name));
  }
  if (variant in FIXED) return FIXED[variant][0] ?? run.cheapest;
  return isRouter(variant) ? `router (${variant})` : variant.replaceAll("-", " ");
}

// The look of a line: a colour of the style sheet and a pattern of dashes.
export function policyLook(given, kinds) {
  const variant = ownName(given);
  if (variant in FIXED) return { colour: `var(${FIXED[variant][1]})`, dash: FIXED[variant][2] };
  if (!isRouter(variant)) return { colour: "var(--bestof)", dash: variant.includes("routes") ? "" : "4 3" };
  const [kind, exact] = variant.split(", ");
  return { colour: `var(--router${Math.max(0, kinds.indexOf(kind)) % ROUTERS})`, dash: exact ? "5 3" : "" };
}

export function routerKinds(results) {
  return [...new Set(results.nll.map((row) => row.kind).filter(Boolean))].sort();
}

export function variantOf(row) {
  if (!row.kind) return row.policy;
  return row.spend === "exact" ? `${row.kind}, exact` : row.kind;
}

// The background of a value: warm above 0 of a loss, cool for a gain; `full` is where the shade is darkest.
export function shade(value, full, diverging, good) {
  const strength = Math.min(1, Math.abs(value) / full) * 0.62;
  if (!(strength > 0.012) || (!diverging && value < 0)) return "";
  const cool = diverging ? (value > 0) === good : good;
  return `rgb(var(${cool ? "--cool" : "--warm"}) / ${strength.toFixed(3)})`;
}
