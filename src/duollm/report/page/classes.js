// Tables of difficulty: every class of tokens, and the tokens helped most.

import { byId, count, el, number, oneLine, percent } from "./dom.js";
import { state } from "./state.js";
import { sortableTable } from "./table.js";

export function drawDifficulty(data) {
  const { difficulty_by_class: classes, helped_most: helped } = data.results;
  const texts = data.domains.map((one) => one.name).filter((name) => [name, "pooled"].includes(state.pool));
  const tables = (rows, tableOf) => texts.map((name) => [name, rows.filter((row) => row.domain === name)]).flatMap(([name, own]) => (own.length ? [tableOf(data, name, own)] : []));
  byId("classes").replaceChildren(...tables(classes, classTable));
  byId("helped").replaceChildren(...tables(helped, helpedTable));
  byId("by-class").hidden = !classes.length;
  byId("helped-most").hidden = !helped.length;
}

function captionOf(data, name, [{ big_layers: k }]) {
  return `${name}, ${k} of ${data.layers} layers big, gains over ${data.cheapest}`;
}

// What is known of one row at least.
function measured(columns, rows) {
  return columns.filter((column) => rows.some((row) => (column.estimate ?? column.value)(row) !== undefined));
}

function classTable(data, domain, rows) {
  const estimated = (field, label, form = number) => ({ name: field, label, high: true, estimate: (row) => row[field], value: (row) => row[field]?.[0], form });
  const share = (value) => percent(value);
  const name = (row) => (row.kind === "python" ? `${row.name} (Python)` : row.name);
  const columns = [
    { name: "class", label: "class", text: name, value: name },
    { name: "tokens", label: "tokens", high: true, text: (row) => count(row.tokens), value: (row) => row.tokens },
    estimated("nll_small", `loss, ${data.cheapest}`),
    estimated("gain", "gain, true labels"),
    estimated("gain_drawn", "gain, made-up labels"),
    estimated("gain_predicted", "gain, predicted"),
    estimated("high_loss", "high loss", share),
    estimated("unhelped", "not helped", share),
  ];
  const marked = rows.map((row) => ({ ...row, marked: row.kind === "all" }));
  return sortableTable({ name: `difficulty-by-class-${domain}`, caption: captionOf(data, domain, rows), columns: measured(columns, rows), rows: marked, sort: "tokens" });
}

function helpedTable(data, domain, rows) {
  const gain = (field, label) => ({ name: field, label, high: true, text: (row) => number(row[field]), value: (row) => row[field] });
  const columns = [
    { name: "token", label: "token", text: (row) => el("code", {}, el("bdi", {}, oneLine(row.text) || "no text")), value: (row) => row.text },
    { name: "times", label: "times", high: true, text: (row) => count(row.tokens), value: (row) => row.tokens },
    gain("gain", "gain, true labels"),
    gain("gain_drawn", "gain, made-up labels"),
    gain("gain_predicted", "gain, predicted"),
    gain("gain_all_big", "gain, all big"),
  ];
  return sortableTable({ name: `helped-most-${domain}`, caption: captionOf(data, domain, rows), columns: measured(columns, rows), rows });
}
