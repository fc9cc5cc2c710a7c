// Starts the page: decodes the data, and draws the view that the address names, again whenever the state changes.

import { decode } from "./decode.js";
import { byId } from "./dom.js";
import { drawExplorer } from "./explorer.js";
import { drawLayers } from "./layers.js";
import { drawClaims, drawFigures, drawRun, drawTables } from "./results.js";
import { onChange, setState, startState, state, address } from "./state.js";
import { drawOverview } from "./story.js";

const VIEWS = { overview: drawOverview, tokens: drawExplorer, layers: drawLayers, claims: drawClaims, tables: drawTables, figures: drawFigures, run: drawRun };

function show(data, changes) {
  if (!(state.view in VIEWS)) state.view = "overview";
  for (const view of Object.keys(VIEWS)) {
    byId(`view-${view}`).hidden = view !== state.view;
    const link = document.querySelector(`nav a[data-view="${view}"]`);
    link.setAttribute("href", address({ view, claim: "" }));
    if (view === state.view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  VIEWS[state.view](data, changes);
}

function prepare(data) {
  document.title = `${data.name} – duollm report`;
  byId("name").textContent = data.name;
  byId("missing").hidden = !data.missing.length;
  byId("missing-stages").textContent = `Still missing: ${data.missing.join(", ")}.`;
  for (const node of document.querySelectorAll("[data-context]")) node.hidden = node.dataset.context !== data.results.context;
  for (const node of document.querySelectorAll("[data-random-routes]")) node.textContent = data.randomRoutes;
  byId("theme").addEventListener("click", () => {
    const root = document.documentElement;
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  });
  byId("share").addEventListener("click", async () => {
    setState({});
    await navigator.clipboard?.writeText(location.href).catch(() => undefined);
    byId("share").textContent = "Link copied";
    setTimeout(() => (byId("share").textContent = "Copy link"), 1500);
  });
}

const data = await decode(JSON.parse(byId("data").textContent));
const { headline, budget, results } = data;
const texts = { pool: headline, domain: data.domains[0].name, context: results.context };
const explored = { policy: "oracle", other: "none", q: "gain", kind: "all", from: "", to: "", find: "", token: -1, pins: [], layer: -1, lanes: "on" };
startState({ view: "overview", k: budget, axis: "layers", claim: "", ...texts, ...explored });
prepare(data);
onChange((changes) => show(data, changes));
show(data, {});
let last = state.view;
onChange(() => {
  if (state.view !== last && !state.claim) scrollTo(0, 0);
  last = state.view;
});
document.documentElement.dataset.ready = "yes";
