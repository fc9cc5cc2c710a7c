// Starts the page: decodes the data, and draws the view that the address names, again whenever the state changes.

import { decode } from "./decode.js";
import { byId, select } from "./dom.js";
import { drawExplorer } from "./explorer.js";
import { drawLayers } from "./layers.js";
import { drawClaims, drawFigures, drawRun, drawTables } from "./results.js";
import { drawRuns } from "./runs.js";
import { onChange, setState, startState, state, address } from "./state.js";
import { domainOptions, drawOverview } from "./story.js";

const VIEWS = { runs: drawRuns, overview: drawOverview, tokens: drawExplorer, layers: drawLayers, claims: drawClaims, tables: drawTables, figures: drawFigures, run: drawRun };

function show(page, changes) {
  const data = page.runs[state.run] ?? page.runs[0];
  if (!(state.view in VIEWS) || (state.view === "runs" && page.runs.length < 2)) state.view = "overview";
  if (!domainOptions(data).some(([name]) => name === state.pool)) state.pool = data.headline;
  if (!data.results.nll.some((row) => row.context === state.context)) state.context = data.results.context;
  const wanted = state.k;
  state.k = Math.min(Math.max(0, Math.round(wanted)), data.layers);
  nameRun(page, data);
  for (const view of Object.keys(VIEWS)) {
    byId(`view-${view}`).hidden = view !== state.view;
    const link = document.querySelector(`nav a[data-view="${view}"]`);
    link.setAttribute("href", address({ view, claim: "" }));
    if (view === state.view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const said = VIEWS[state.view](data, changes); // what the reader should know of the choices that the view could not keep
  const clamped = wanted === state.k ? "" : `${wanted} big layers were asked for; the model can have 0 to ${data.layers}. `;
  byId("notice").hidden = !(clamped || said);
  byId("notice").textContent = clamped + (said ?? "");
}

// What the page says about the run that it shows.
function nameRun(page, data) {
  document.title = `${data.name} – duollm report`;
  if (page.runs.length > 1) byId("run-choice").replaceChildren(select("Run", page.runs.map((run, i) => [i, run.name]), page.runs.indexOf(data), (value) => setState({ run: Number(value), token: -1, pins: [] })));
  else byId("name").textContent = data.name;
  byId("missing").hidden = !data.missing.length;
  byId("missing-stages").textContent = `Still missing: ${data.missing.join(", ")}.`;
  for (const node of document.querySelectorAll("[data-context]")) node.hidden = node.dataset.context !== data.results.context;
  for (const node of document.querySelectorAll("[data-random-routes]")) node.textContent = data.randomRoutes;
  for (const node of document.querySelectorAll("[data-drawn-from]")) node.textContent = data.drawnFrom;
}

function prepare(page) {
  document.querySelector('nav a[data-view="runs"]').hidden = page.runs.length < 2;
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("duollm-theme", root.dataset.theme);
    } catch {
      // a browser that keeps nothing for a file starts in its own theme again
    }
  });
  byId("share").addEventListener("click", async () => {
    setState({});
    await navigator.clipboard?.writeText(location.href).catch(() => undefined);
    byId("share").textContent = "Link copied";
    setTimeout(() => (byId("share").textContent = "Copy link"), 1500);
  });
}

const page = await decode(byId("data").textContent.trim());
const { headline, budget, results, domains } = page.runs[0];
const texts = { run: 0, pool: headline, domain: domains[0].name, context: results.context };
const explored = { policy: "oracle", other: "none", q: "gain", kind: "all", from: "", to: "", find: "", token: -1, pins: [], layer: -1, lanes: "on", map: "all" };
startState({ view: page.runs.length > 1 ? "runs" : "overview", k: budget, axis: "layers", claim: "", ...texts, ...explored });
prepare(page);
onChange((changes) => show(page, changes));
show(page, {});
let last = state.view;
onChange(() => {
  if (state.view !== last && !state.claim) scrollTo(0, 0);
  last = state.view;
});
// Charts and text draw themselves when their size is known, in the first frame.
requestAnimationFrame(() => requestAnimationFrame(() => (document.documentElement.dataset.ready = "yes")));
