// Tables, plain and sortable. A column of estimates shows a number, a whisker on a scale that the column shares, and the interval.

import { csv, download, el, interval, number, svg } from "./dom.js";

const WIDTH = 92;

// columns: {name, label, text(row), value(row) for sorting, estimate(row), form, mark(row), high: more is better, words: text also in the CSV}
export function sortableTable({ name, caption, columns, rows, sort = null, descending = true }) {
  const body = el("tbody");
  const headings = columns.map((column) => {
    const button = el("button", { type: "button", click: () => order(column) }, column.label);
    return el("th", { scope: "col" }, column.value ? button : column.label);
  });
  const ranges = new Map(columns.filter((c) => c.estimate).map((c) => [c, rangeOf(rows.map(c.estimate))]));

  function order(column) {
    descending = sort === column.name ? !descending : Boolean(column.high); // the best first
    sort = column.name;
    draw();
  }

  function draw() {
    const column = columns.find((one) => one.name === sort);
    const ordered = column ? [...rows].sort((a, b) => compare(column.value(a), column.value(b), descending)) : rows;
    columns.forEach((one, i) => headings[i].setAttribute("aria-sort", one.name !== sort ? "none" : descending ? "descending" : "ascending"));
    body.replaceChildren(...ordered.map((row) => el("tr", { class: row.marked ? "marked" : null }, columns.map((c, i) => cell(c, row, i, ranges.get(c))))));
  }

  draw();
  const save = () => download(`${name}.csv`, csv(tableRows(columns, rows)), "text/csv");
  return el(
    "div",
    { class: "tablebox" },
    el("table", { class: "sortable" }, el("caption", {}, caption), el("thead", {}, el("tr", {}, headings)), body),
    el("div", { class: "downloads" }, el("button", { type: "button", click: save }, "CSV")),
  );
}

// A table in which nothing is sorted. The first cell of a row names it.
export function plainTable(names, rows, caption) {
  const line = ([first, ...rest]) => el("tr", {}, el("th", { scope: "row", "data-label": names[0] }, first), rest.map((cell, i) => el("td", { "data-label": names[i + 1] }, cell)));
  const head = el("thead", {}, el("tr", {}, names.map((name) => el("th", { scope: "col" }, name))));
  return el("table", { class: "plain stacked" }, caption && el("caption", {}, caption), head, el("tbody", {}, rows.map(line)));
}

function compare(a, b, descending) {
  if (a === null || a === undefined) return 1;
  if (b === null || b === undefined) return -1;
  const order = typeof a === "string" ? a.localeCompare(b) : a - b;
  return descending ? -order : order;
}

function cell(column, row, place, range) {
  const attributes = { "data-label": column.label, class: column.mark?.(row) || null };
  if (place === 0) return el("th", { scope: "row", ...attributes }, column.text(row));
  const estimate = column.estimate?.(row);
  const text = column.estimate ? "–" : column.text(row);
  if (!estimate) return el("td", text === "–" ? { ...attributes, class: "none" } : attributes, text);
  const form = column.form ?? number;
  return el("td", { ...attributes, title: `${form(estimate[0])} ${interval(estimate, form)}` }, el("b", {}, form(estimate[0])), whisker(estimate, range), el("small", {}, interval(estimate, form)));
}

function rangeOf(estimates) {
  const ends = estimates.filter(Boolean).flat().filter(Number.isFinite);
  return [Math.min(...ends), Math.max(...ends)];
}

export function whisker(estimate, [low, high]) {
  const at = (value) => (4 + ((value - low) / (high - low || 1)) * (WIDTH - 8)).toFixed(1);
  const picture = svg("svg", { width: WIDTH, height: 12, viewBox: `0 0 ${WIDTH} 12`, class: "whisker", "aria-hidden": "true" });
  if (low < 0 && high > 0) picture.append(svg("line", { x1: at(0), x2: at(0), y1: 0, y2: 12, class: "zero" }));
  if (Number.isFinite(estimate[1])) picture.append(svg("line", { x1: at(estimate[1]), x2: at(estimate[2]), y1: 6, y2: 6 }));
  picture.append(svg("circle", { cx: at(estimate[0]), cy: 6, r: 3 }));
  return picture;
}

function tableRows(columns, rows) {
  const names = columns.flatMap((c) => (c.estimate ? [c.label, `${c.label} low`, `${c.label} high`] : [c.label]));
  const line = (row) => columns.flatMap((c) => (c.estimate ? (c.estimate(row) ?? [null, null, null]) : [c.value && !c.words ? c.value(row) : c.text(row)]));
  return [names, ...rows.map(line)];
}
