// Line charts with intervals, and maps of layers, drawn as SVG from data. Each can be had as SVG and as CSV.

import { count, csv, download, el, number, svg } from "./dom.js";
import { lineNames, roomFor } from "./names.js";

const MARGIN = { left: 66, right: 14, top: 12, bottom: 42 };
const TITLE = 26; // height of the title of a saved picture
const NAMED = 560; // width from which on a chart names its lines

export function frame(height) {
  return { y1: MARGIN.top, y2: height - MARGIN.bottom };
}

export function ticks(low, high, wanted, least = 0) {
  const rough = Math.max(least, (high - low || 1) / wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return { found, decimals: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

// Calls `show` with the event while a picture is pointed at or after a tap on it, and with null when that ends.
export function onPointing(picture, show) {
  picture.addEventListener("pointermove", show);
  picture.addEventListener("pointerdown", show);
  picture.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && show(null));
  picture.addEventListener("blur", () => show(null));
}

// Puts a readout on the side of the plot that is not pointed at, or below the plot if that side is too narrow.
export function placeReadout(readout, at, width, height) {
  const taken = readout.offsetWidth + 12;
  const beside = at > width / 2 ? at > MARGIN.left + taken : width - at > MARGIN.right + taken;
  readout.style.top = beside ? "4px" : `${height}px`;
  readout.style.left = !beside ? "0" : at > width / 2 ? `${MARGIN.left}px` : `${width - MARGIN.right - readout.offsetWidth}px`;
}

// brackets: what the intervals are of, if not of the value beside them.
// whole: the numbers on the x axis are counts; shared: what several charts have from `chosenLines`.
// series: {name, end, colour, dash, off, level, points: [{x, y, low, high, note}]}. A level is drawn from side to side.
// end: the short name that stands at the line, if the chart is wide enough.
export function lineChart({ title, x, y, series, name, height = 340, log = false, band = true, whole = false, join = true, note = "", brackets = "", shared }) {
  const box = el("div", { class: "plot" });
  const readout = el("div", { class: "readout", "aria-live": "polite", hidden: true });
  const lines = shared ?? chosenLines(series, join);
  const { hidden } = lines;
  let width = 0;
  let at = null;

  function shown() {
    return series.filter((one) => !hidden.has(one.name) && one.points.length);
  }

  function draw() {
    const drawn = shown();
    const points = drawn.flatMap((one) => one.points);
    box.replaceChildren();
    if (!width || !points.length) return;
    const xs = points.map((p) => p.x);
    const ys = points.flatMap((p) => (band ? [p.low ?? p.y, p.high ?? p.y] : [p.y]));
    const room = width < NAMED ? 0 : roomFor(drawn);
    const scale = scales(Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys), width, height, log, whole, room);
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": title });
    picture.append(axes(scale, width, height, x, y), ...drawn.map((one) => line(one, scale, band, join)), ...(room ? lineNames(drawn, scale, { left: MARGIN.left, right: scale.right, top: MARGIN.top, floor: height - MARGIN.bottom }) : []));
    const cursor = svg("line", { y1: MARGIN.top, y2: height - MARGIN.bottom, stroke: "var(--soft)", "stroke-dasharray": "2 3", visibility: "hidden" });
    picture.append(cursor);
    const stops = [...new Set(drawn.filter((one) => !one.level).flatMap((one) => one.points.map((p) => p.x)))].sort((a, b) => a - b);
    function point(to) {
      at = to;
      cursor.setAttribute("visibility", to === null ? "hidden" : "visible");
      readout.hidden = to === null;
      if (to === null) return;
      cursor.setAttribute("x1", scale.x(to));
      cursor.setAttribute("x2", scale.x(to));
      readout.replaceChildren(...describe(drawn, to, x, log ? 0 : (Math.max(...xs) - Math.min(...xs)) / 24), brackets && el("small", {}, brackets));
      placeReadout(readout, scale.x(to), width, height);
    }
    onPointing(picture, (event) => {
      if (!event) return point(null);
      const place = event.clientX - picture.getBoundingClientRect().left;
      point(stops.reduce((best, stop) => (Math.abs(scale.x(stop) - place) < Math.abs(scale.x(best) - place) ? stop : best), stops[0]));
    });
    picture.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!move) return;
      event.preventDefault();
      const now = at === null ? (move > 0 ? -1 : stops.length) : stops.indexOf(at);
      point(stops[Math.min(stops.length - 1, Math.max(0, now + move))]);
    });
    box.append(picture, readout);
  }

  new ResizeObserver(([entry]) => {
    const wanted = Math.floor(entry.contentRect.width);
    if (wanted && wanted !== width) {
      width = wanted;
      draw();
    }
  }).observe(box);
  lines.redraw.push(draw);
  const rows = [["line", x, y, "low", "high", "note"]];
  for (const one of series) for (const p of one.points) rows.push([one.name, p.x, p.y, p.low, p.high, p.note]);
  return el("figure", { class: "chart" }, el("h3", {}, title), note ? el("p", { class: "soft" }, note) : null, shared ? null : lines.legend, box, downloads(name, title, box, shown, rows));
}

// Which lines are shown, with the legend that hides and shows them; charts that show the same policies can share it.
export function chosenLines(series, join = true) {
  const hidden = new Set(series.filter((one) => one.off).map((one) => one.name));
  const redraw = [];
  const legend = el("div", { class: "legend", role: "group", "aria-label": "Lines shown" });
  for (const one of new Map(series.map((own) => [own.name, own])).values()) {
    const mark = (join && one.points.length > 1) || one.level ? svg("line", { x1: 1, x2: 25, y1: 5, y2: 5, stroke: one.colour, "stroke-width": 3, "stroke-dasharray": one.dash || null }) : svg("circle", { cx: 13, cy: 5, r: 3.5, fill: one.colour });
    const toggle = (event) => {
      hidden.has(one.name) ? hidden.delete(one.name) : hidden.add(one.name);
      event.currentTarget.setAttribute("aria-pressed", String(!hidden.has(one.name)));
      redraw.forEach((draw) => draw());
    };
    legend.append(el("button", { type: "button", class: one.off ? "spare" : null, "aria-pressed": String(!hidden.has(one.name)), click: toggle }, svg("svg", { width: 26, height: 10, "aria-hidden": "true" }, mark), one.name));
  }
  if (hidden.size) legend.append(el("button", { type: "button", "aria-expanded": "false", click: ({ currentTarget }) => currentTarget.setAttribute("aria-expanded", String(legend.classList.toggle("all"))) }, `${hidden.size} more`));
  return { hidden, redraw, legend };
}

// room: pixels kept free at the right.
export function scales(x0, x1, y0, y1, width, height, log, whole = false, room = 0) {
  const pad = (y1 - y0 || 1) * 0.05;
  const place = log ? Math.log10 : (value) => value;
  const [first, last] = [place(x0), place(x1)];
  const right = width - MARGIN.right - room;
  const inside = { width: right - MARGIN.left, height: height - MARGIN.top - MARGIN.bottom };
  return {
    right,
    x: (value) => MARGIN.left + 8 + ((place(value) - first) / (last - first || 1)) * (inside.width - 16),
    y: (value) => MARGIN.top + ((y1 + pad - value) / (y1 - y0 + 2 * pad)) * inside.height,
    xTicks: log ? { found: [1, 2, 5, 10, 20, 50, 100].filter((tick) => tick >= x0 && tick <= x1), decimals: 0 } : ticks(x0, x1, width < 450 ? 5 : 9, whole ? 1 : 0),
    yTicks: ticks(y0 - pad, y1 + pad, 6),
  };
}

export function axes(scale, width, height, xName, yName) {
  const group = svg("g", { class: "axes" });
  const floor = height - MARGIN.bottom;
  for (const tick of scale.yTicks.found) {
    group.append(svg("line", { x1: MARGIN.left, x2: scale.right, y1: scale.y(tick), y2: scale.y(tick) }));
    group.append(svg("text", { x: MARGIN.left - 6, y: scale.y(tick) + 4, "text-anchor": "end" }, number(tick, scale.yTicks.decimals)));
  }
  for (const tick of scale.xTicks.found) {
    group.append(svg("text", { x: scale.x(tick), y: floor + 16, "text-anchor": "middle" }, number(tick, scale.xTicks.decimals)));
  }
  group.append(svg("text", { x: (MARGIN.left + scale.right) / 2, y: height - 6, "text-anchor": "middle", class: "name" }, xName));
  group.append(svg("text", { transform: `translate(13 ${(floor + MARGIN.top) / 2}) rotate(-90)`, "text-anchor": "middle", class: "name" }, yName));
  return group;
}

function line(one, scale, band, join) {
  const group = svg("g", { "data-series": one.name });
  const points = one.level ? [MARGIN.left, scale.right].map((place) => ({ ...one.points[0], place })) : [...one.points].sort((a, b) => a.x - b.x);
  const left = (p) => p.place ?? scale.x(p.x);
  const path = (ps, of) => ps.map((p) => `${left(p).toFixed(1)},${scale.y(of(p)).toFixed(1)}`).join(" ");
  const certain = points.filter((p) => Number.isFinite(p.low) && Number.isFinite(p.high));
  if (band && certain.length > 1) {
    const outline = `${path(certain, (p) => p.high)} ${path([...certain].reverse(), (p) => p.low)}`;
    group.append(svg("polygon", { points: outline, fill: one.colour, opacity: one.level ? 0.08 : 0.16 }));
  }
  if (join || one.level) group.append(svg("polyline", { points: path(points, (p) => p.y), fill: "none", stroke: one.colour, "stroke-width": 2, "stroke-dasharray": one.dash || null }));
  if (!one.level) group.append(...points.map((p) => svg("circle", { cx: left(p), cy: scale.y(p.y), r: 3.2, fill: one.colour })), ...points.filter((p) => p.label).map((p) => svg("text", { x: left(p) + 5, y: scale.y(p.y) - 4, fill: one.colour, class: "key" }, p.label)));
  return group;
}

function describe(lines, at, xName, reach) {
  const rows = [];
  for (const one of lines) {
    const near = one.level ? one.points[0] : one.points.reduce((best, p) => (Math.abs(p.x - at) < Math.abs(best.x - at) ? p : best), one.points[0]);
    if (!one.level && Math.abs(near.x - at) > reach + 1e-9) continue;
    const range = near.low < near.high ? `[${number(near.low)}, ${number(near.high)}]` : "";
    rows.push({ near, row: el("tr", {}, el("th", { scope: "row" }, el("i", { style: `background:${one.colour}` }), one.name), el("td", {}, number(near.y)), el("td", {}, range, near.note ? ` ${near.note}` : "")) });
  }
  rows.sort((a, b) => b.near.y - a.near.y);
  return [el("b", {}, `${xName}: ${Number.isInteger(at) ? count(at) : number(at, 2)}`), el("table", {}, rows.map((one) => one.row))];
}

// A map of numbers [row][column] about 0: orange above, blue below, `end` at the strongest. It tells the cell that is pointed at.
export function heatMap({ values, end, width = 240, height = 132, title, rowName, columnName, describeCell, told }) {
  const [rows, columns] = [values.length, values[0].length];
  const [w, h] = [(width - 24) / columns, (height - 20) / rows];
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title, class: "map" });
  values.forEach((row, r) =>
    row.forEach((value, c) => {
      const strength = Math.min(1, Math.abs(value) / end);
      const cell = { x: 22 + c * w, y: r * h, width: w + 0.3, height: h + 0.3, fill: `rgb(var(${value > 0 ? "--warm" : "--cool"}))`, "fill-opacity": strength.toFixed(3) };
      picture.append(svg("rect", { ...cell, "data-cell": describeCell(r, c, value) }));
    }),
  );
  onPointing(picture, (event) => told(event?.target.dataset.cell));
  const text = (x, y, anchor, content) => svg("text", { x, y, "text-anchor": anchor }, content);
  picture.append(text(18, 9, "end", "0"), text(18, height - 22, "end", String(rows - 1)));
  picture.append(svg("text", { transform: `translate(9 ${(height - 20) / 2}) rotate(-90)`, "text-anchor": "middle" }, rowName));
  picture.append(text(22 + (width - 24) / 2, height - 5, "middle", columnName));
  return picture;
}

// keys(): {name, colour, dash} of what the picture shows now; the saved picture holds title and legend too.
export function downloads(name, title, holder, keys, rows) {
  const picture = () => download(`${name}.svg`, standalone(title, holder, keys()), "image/svg+xml");
  return el(
    "div",
    { class: "downloads" },
    el("button", { type: "button", click: picture }, "SVG"),
    el("button", { type: "button", click: () => download(`${name}.csv`, csv(rows), "text/csv") }, "CSV"),
  );
}

// The picture as a file of its own: colours and fonts that the page's style gives are written into it.
function standalone(title, holder, keys) {
  const shown = holder.querySelector("svg");
  const [width, height] = ["width", "height"].map((name) => Number(shown.getAttribute(name)));
  const legend = legendOf(keys, width);
  const size = { width, height: TITLE + height + legend.height };
  const picture = svg("svg", { ...size, viewBox: `0 0 ${width} ${size.height}`, xmlns: "http://www.w3.org/2000/svg" });
  picture.append(svg("rect", { ...size, fill: "var(--paper)" }), svg("text", { x: 12, y: 18, fill: "var(--ink)", "font-weight": 600 }, title));
  picture.append(svg("g", { transform: `translate(0 ${TITLE})` }, [...shown.cloneNode(true).childNodes]), svg("g", { transform: `translate(0 ${TITLE + height})` }, legend.nodes));
  holder.append(picture); // the style of the page holds for what is in it only
  for (const node of picture.querySelectorAll("*")) {
    const style = getComputedStyle(node);
    for (const name of ["fill", "stroke", "font-size", "font-family"]) node.setAttribute(name, style.getPropertyValue(name));
  }
  picture.remove();
  return new XMLSerializer().serializeToString(picture);
}

function legendOf(keys, width) {
  const nodes = [];
  let [x, y] = [12, 12];
  for (const { name, colour, dash } of keys) {
    const wanted = 44 + 7.5 * name.length;
    if (x > 12 && x + wanted > width) [x, y] = [12, y + 20];
    nodes.push(svg("line", { x1: x, x2: x + 24, y1: y, y2: y, stroke: colour, "stroke-width": 3, "stroke-dasharray": dash || null }));
    nodes.push(svg("text", { x: x + 30, y: y + 4, fill: "var(--ink)", class: "key" }, name));
    x += wanted;
  }
  return { nodes, height: y + 12 };
}
