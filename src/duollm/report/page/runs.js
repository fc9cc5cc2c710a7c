// Several runs side by side: their frontiers, their main numbers, the verdicts on the claims, the text that they share, and how their settings differ.

import { lineChart } from "./chart.js";
import { isRouter } from "./colour.js";
import { OF_RUN, lossAt } from "./decode.js";
import { byId, count, el, number, percent, select, signed } from "./dom.js";
import { PAIRED, frontierLines } from "./frontier.js";
import { findPolicy } from "./quantities.js";
import { address, setState, state } from "./state.js";
import { claimsOn, decided, domainName, domainOptions, factsAt, judged } from "./story.js";
import { plainTable, sortableTable } from "./table.js";

const COLOURS = 6;
const DASHES = { oracle: "", static: "6 3", "executed-together": "1 4" };
const ROUTER = "2 3";

export function drawRuns(data) {
  const { runs } = data.page;
  byId("runs-controls").replaceChildren(
    select("Text", sharedDomains(runs), state.pool, (value) => setState({ pool: value })),
    select("Cost", [["layers", "big layers"], ["flops", "FLOPs"]], state.axis, (value) => setState({ axis: value })),
  );
  byId("runs-frontier").replaceChildren(overlaid(runs));
  byId("runs-numbers").replaceChildren(mainNumbers(runs));
  byId("runs-claims").replaceChildren(claimsBeside(data.page));
  byId("runs-texts").replaceChildren(...commonTexts(runs));
  byId("runs-settings").replaceChildren(settingsTable(data.page));
}

function sharedDomains(runs) {
  const others = runs.slice(1).map((run) => domainOptions(run).map(([name]) => name));
  return domainOptions(runs[0]).filter(([name]) => others.every((names) => names.includes(name)));
}

function poolOf(run) {
  return domainOptions(run).some(([name]) => name === state.pool) ? state.pool : run.headline;
}

// One colour a run, one pattern of dashes a kind of policy.
function overlaid(runs) {
  const flops = state.axis === "flops";
  const series = runs.flatMap((run, i) =>
    frontierLines(run, poolOf(run), run.results.context, state.axis)
      .filter((one) => one.variant in DASHES || isRouter(one.variant))
      .map((one) => ({
        ...one,
        name: run.name + OF_RUN + one.name,
        colour: `var(--router${i % COLOURS})`,
        dash: DASHES[one.variant] ?? ROUTER,
        off: one.off || one.variant === "executed-together",
        points: one.points.map((p) => ({ ...p, x: flops ? p.x : p.x / run.layers })),
      })),
  );
  const x = flops ? "FLOPs per token, all big of its own model = 1" : "share of big layers";
  return lineChart({ title: "Loss against what is spent", name: "runs", x, y: "mean loss (nats per token)", series, brackets: PAIRED, height: 380 });
}

function mainNumbers(runs) {
  const rows = runs.map((run) => {
    const facts = factsAt(run, poolOf(run), run.budget, run.results.context);
    const loss = (policy) => run.results.nll.find((row) => row.domain === poolOf(run) && row.policy === policy && (policy !== "static" || row.big_layers === run.budget))?.nll;
    return { run, ...facts, drawn: facts.noise?.gain_drawn, gain: facts.router?.gain, big: loss("all-big"), fixed: loss("static") };
  });
  const estimate = (name, label, form = number) => ({ name, label, form, estimate: (row) => row[name], value: (row) => row[name]?.[0] });
  const { model } = runs[0].results;
  const columns = [
    { name: "run", label: "run", text: (row) => row.run.name, value: (row) => row.run.name },
    { name: "layers", label: "big layers", text: (row) => `${row.run.budget} of ${row.run.layers}`, value: (row) => row.run.layers },
    { name: "parameters", label: "parameters", text: (row) => row.run.results.model.parameters?.toLocaleString("en-US") ?? "–", value: (row) => row.run.results.model.parameters },
    estimate("big", "loss, all big"),
    estimate("fixed", "loss, fixed pattern"),
    estimate("oracle", "oracle's gain", signed),
    estimate("drawn", "gain on made-up labels", signed),
    estimate("gain", "best router's gain", signed),
  ].filter((column) => column.name !== "parameters" || model.parameters);
  return sortableTable({ name: "runs", caption: "nats per token; gains are over the fixed pattern", columns, rows });
}

// A row a claim, a column a run; and one for all runs where they are of one study.
function claimsBeside({ runs, together }) {
  const all = together[state.pool];
  const columns = [...runs.map((run) => claimsOn(run, poolOf(run))), ...(all ? [all] : [])];
  const ids = [...new Set(columns.flat().map((claim) => claim.id))];
  const none = { verdict: "not measured" };
  const claims = ids.map((id) => columns.map((column) => column.find((claim) => claim.id === id) ?? none));
  const firstMeasured = (row) => row.find((claim) => claim.verdict !== none.verdict);
  const rows = claims.filter(firstMeasured).map((row) => {
    const first = firstMeasured(row);
    const link = el("a", { href: address({ view: "claims", claim: first.id, run: row.indexOf(first) }) }, first.id);
    const where = ({ domain, estimate }) => estimate && domain !== state.pool && el("small", {}, `on ${domainName(domain)}`);
    return [[link, `: ${first.statement}`, el("small", {}, judged(first))], ...row.map((claim) => decided(claim, first.quantity, where(claim)))];
  });
  const open = ids.filter((id, i) => !firstMeasured(claims[i]));
  byId("runs-together").hidden = !all;
  byId("runs-open").textContent = open.length ? `None of these runs measured ${open.join(", ")}.` : "";
  return plainTable(["claim", ...runs.map((run) => run.name), ...(all ? ["together"] : [])], rows, domainName(state.pool));
}

function commonTexts(runs) {
  const links = runs.flatMap((run, i) =>
    runs.slice(i + 1).flatMap((other) =>
      run.domains.flatMap((domain) => {
        const guest = findPolicy(domain, `${other.name}${OF_RUN}all-big`, run.layers, state.context);
        if (!guest) return [];
        const covered = [...guest.cut.row.keys()].filter((t) => guest.cut.row[t] >= 0);
        const cutAlike = covered.every((t) => guest.cut.share[t] === 1 && guest.cut.first[t] === guest.cut.last[t]);
        const lower = covered.filter((t) => lossAt(domain.policies[0], t) < lossAt(guest, t)).length / covered.length;
        const view = { view: "tokens", run: i, domain: domain.name, policy: "all-big", other: guest.policy, q: "loss" };
        const tokens = cutAlike ? "tokens" : `tokens of ${run.name}, over which the losses of ${other.name}'s tokens on the same piece of text are spread by length`;
        return [el("li", {}, el("a", { href: address(view) }, `${domain.name}: ${run.name} beside ${other.name}`), `, ${count(covered.length)} ${tokens}; with all big, ${run.name} has the lower loss on ${percent(lower)} of them`)];
      }),
    ),
  );
  return links.length ? links : [el("li", {}, whyNoText(runs))];
}

function whyNoText(runs) {
  const old = runs.filter((run) => run.domains.some((domain) => !domain.begins)).map((run) => run.name);
  if (!old.length) return "These runs show no text in common.";
  return `These runs show no text that is cut into the same tokens. To align other tokens it takes the token that begins each window, which the oracle's files of ${old.join(" and ")} do not hold.`;
}

function settingsTable({ runs, settings: rows }) {
  if (!rows.length) return el("p", {}, "The recipes are the same.");
  return plainTable(["setting", ...runs.map((run) => run.name)], rows.map(([name, values]) => [name, ...values]));
}
