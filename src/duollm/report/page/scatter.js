// A cloud of points: one per token. Pointing names the nearest one, a click or Enter opens it.

import { axes, downloads, frame, onPointing, placeReadout, scales } from "./chart.js";
import { el, svg } from "./dom.js";

const REACH = 14; // pixels within which a point is meant

// points: {x, y, group}; groups: {name, colour} by group; marks: {x, y} lines to divide the plane; describe(point): nodes; rows: the CSV.
export function scatterChart({ title, name, x, y, points, groups, marks, describe, choose, note, rows, height = 280 }) {
  const box = el("div", { class: "plot" });
  const readout = el("div", { class: "readout", "aria-live": "polite", hidden: true });
  const ordered = [...points].sort((a, b) => a.x - b.x);
  let current = null;

  function draw(width) {
    const ends = (of) => [Math.min(...points.map(of)), Math.max(...points.map(of))];
    const scale = scales(...ends((p) => p.x), ...ends((p) => p.y), width, height, false);
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": `${title}. ${note}` });
    picture.append(axes(scale, width, height, x, y));
    for (const [group, { colour }] of Object.entries(groups)) {
      const own = points.filter((p) => p.group === group);
      picture.append(svg("path", { d: own.map((p) => `M${scale.x(p.x).toFixed(1)} ${scale.y(p.y).toFixed(1)}h0`).join(""), stroke: colour, "stroke-width": 5, "stroke-linecap": "round", "stroke-opacity": 0.5, "data-group": group }));
    }
    const [left, right] = [scale.x(ordered[0].x), scale.x(ordered.at(-1).x)];
    picture.append(svg("line", { x1: scale.x(marks.x), x2: scale.x(marks.x), ...frame(height), stroke: "var(--ink)", "stroke-dasharray": "6 4" }));
    picture.append(svg("line", { x1: left, x2: right, y1: scale.y(marks.y), y2: scale.y(marks.y), stroke: "var(--ink)", "stroke-dasharray": "2 3" }));
    const ring = svg("circle", { r: 6, fill: "none", stroke: "var(--ink)", "stroke-width": 2, visibility: "hidden" });
    picture.append(ring);

    function point(to) {
      current = to;
      ring.setAttribute("visibility", to ? "visible" : "hidden");
      readout.hidden = !to;
      if (!to) return;
      const [cx, cy] = [scale.x(to.x), scale.y(to.y)];
      ring.setAttribute("cx", cx);
      ring.setAttribute("cy", cy);
      readout.replaceChildren(...describe(to));
      placeReadout(readout, cx, width, height);
    }
    let tapped = false; // a first tap names a point, as pointing does; the next one opens it
    onPointing(picture, (event) => {
      if (!event) return point(null);
      const area = picture.getBoundingClientRect();
      const far = (p) => Math.hypot(scale.x(p.x) - event.clientX + area.left, scale.y(p.y) - event.clientY + area.top);
      const nearest = points.reduce((best, p) => (far(p) < far(best) ? p : best));
      const near = far(nearest) < REACH ? nearest : null;
      if (event.type === "pointerdown") tapped = event.pointerType !== "mouse" && near !== current;
      point(near);
    });
    picture.addEventListener("click", () => current && !tapped && choose(current));
    picture.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (move) point(ordered[Math.min(ordered.length - 1, Math.max(0, ordered.indexOf(current) + move))]);
      else if (event.key === "Enter" && current) choose(current);
      else return;
      event.preventDefault();
    });
    box.replaceChildren(picture, readout);
  }

  new ResizeObserver(([entry]) => entry.contentRect.width && draw(Math.floor(entry.contentRect.width))).observe(box);
  const key = Object.values(groups).map(({ name: own, colour }) => el("span", { class: "scale" }, el("i", { class: "dot", style: `background:${colour}` }), own));
  return el("figure", { class: "chart" }, el("h3", {}, title), el("div", { class: "scalebar" }, key, el("small", {}, note)), box, downloads(name, title, box, () => Object.values(groups), rows));
}
