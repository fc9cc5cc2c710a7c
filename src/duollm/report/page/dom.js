// Elements, numbers and downloads. Text goes in as text nodes only, so no token or file name is ever run.

const SVG = "http://www.w3.org/2000/svg";

export function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export function byId(id) {
  return document.getElementById(id);
}

export function number(value, decimals = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const text = value.toFixed(decimals);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
}

export function signed(value, decimals = 3) {
  return (value > 0 ? "+" : "") + number(value, decimals);
}

export function percent(value, decimals = 0) {
  return `${number(100 * value, decimals)} %`;
}

export function pValue(p) {
  return p === undefined ? "–" : p < 0.001 ? "< 0.001" : number(p);
}

export function count(value) {
  return value.toLocaleString("en-US");
}

// An estimate is [value, low, high]; the ends of its 95 % interval are null where one document has none.
export function interval(estimate, form = number) {
  return `[${form(estimate[1])}, ${form(estimate[2])}]`;
}

export function withInterval(estimate, form = number) {
  return estimate ? `${form(estimate[0])} ${interval(estimate, form)}` : "not measured";
}

// What a token's text looks like: line ends, tabs and lone spaces as marks, and no character that could hide or reorder.
export function visible(text) {
  if (text && !text.trim().length && /^ +$/.test(text)) return "·".repeat(text.length);
  return text.replaceAll("\r", "").replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (c) => ({ "\n": "↵\n", "\t": "⇥" })[c] ?? "�");
}

export function oneLine(text) {
  return visible(text).replaceAll("\n", "").replaceAll(" ", "·");
}

// A choice; where there is nothing to choose, the only option as text.
export function select(label, options, value, change) {
  if (options.length === 1) return el("span", { class: "control" }, el("span", {}, label), el("b", {}, options[0][1]));
  const input = el("select", { "aria-label": label, change: (event) => change(event.target.value) });
  for (const [key, text] of options) input.append(el("option", { value: key, selected: String(key) === String(value) }, text));
  return el("label", { class: "control" }, el("span", {}, label), input);
}

export function download(name, text, type) {
  const link = el("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

export function csv(rows) {
  const text = (value) => (typeof value === "number" ? String(Number(value.toPrecision(6))) : String(value ?? ""));
  const quoted = (value) => (/[",\n\r]/.test(value) ? `"${value.replaceAll('"', '""')}"` : value);
  return rows.map((row) => row.map((value) => quoted(text(value))).join(",")).join("\r\n") + "\r\n";
}
