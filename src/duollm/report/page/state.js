// What is shown lives in the address, as #view?name=value&..., so that a view can be shared as a link.

const listeners = [];
const defaults = {};
export const state = {};

export function startState(initial) {
  Object.assign(defaults, initial);
  addEventListener("hashchange", () => {
    readAddress();
    notify({});
  });
  readAddress();
}

export function onChange(listener) {
  listeners.push(listener);
}

export function setState(changes) {
  Object.assign(state, changes);
  history.replaceState(null, "", address());
  notify(changes);
}

function notify(changes) {
  for (const listener of listeners) listener(changes);
}

export function address(changes = {}) {
  const wanted = { ...state, ...changes };
  const given = Object.entries(wanted).filter(([key, value]) => key !== "view" && String(value) !== String(defaults[key]));
  const query = new URLSearchParams(given).toString();
  return `#${wanted.view}${query && "?"}${query}`;
}

function readAddress() {
  const [view, query] = location.hash.slice(1).split("?");
  Object.assign(state, structuredClone(defaults));
  if (view) state.view = view;
  for (const [key, text] of new URLSearchParams(query ?? "")) {
    if (!(key in defaults)) continue;
    const kind = defaults[key];
    if (Array.isArray(kind)) state[key] = text ? text.split(",").map(Number).filter(Number.isInteger) : [];
    else if (typeof kind === "number") state[key] = Number.isFinite(Number(text)) ? Number(text) : kind;
    else state[key] = text;
  }
}
