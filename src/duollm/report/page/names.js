// The names of lines inside a chart: beside the line where it runs alone, or else at the right edge.

import { svg } from "./dom.js";

const ROW = 14; // height of a name
const ALONE = 12; // pixels to the next line, at least, where a name stands beside its line
const LETTER = 6.6;
const EDGE = 22; // from the end of the lines to a name at the edge

export function roomFor(lines) {
  return Math.max(0, ...lines.map((one) => (one.end ? EDGE + LETTER * one.end.length : 0)));
}

// frame: {left, right, top, floor} of the plot, in pixels.
export function lineNames(lines, scale, frame) {
  const drawn = lines.map((one) => ({ one, points: courseOf(one, scale, frame) }));
  const placed = drawn.filter(({ one }) => one.end).map((line) => ({ ...line, place: besideLine(line, drawn, frame) }));
  const beside = placed.filter(({ place }) => place).map(({ one, place }) => svg("text", { x: place.x, y: place.y, "text-anchor": "middle", fill: "var(--ink)", class: "key", "data-end": one.name }, one.end));
  return [...beside, ...atEdge(placed.filter(({ place }) => !place), frame)];
}

function courseOf(one, scale, { left, right }) {
  if (one.level) return [left, right].map((x) => ({ x, y: scale.y(one.points[0].y) }));
  return one.points.map((p) => ({ x: scale.x(p.x), y: scale.y(p.y) })).sort((a, b) => a.x - b.x);
}

// Where a line runs at x; null where it does not.
function heightAt({ points }, x) {
  const i = points.findIndex((p, n) => n + 1 < points.length && p.x <= x && x <= points[n + 1].x);
  if (i < 0) return null;
  const [a, b] = [points[i], points[i + 1]];
  return a.y + ((x - a.x) / (b.x - a.x || 1)) * (b.y - a.y);
}

// The place above or below a point of the line that is farthest from all others and where no line crosses the name.
function besideLine(line, lines, { left, right, top, floor }) {
  if (line.one.level) return null;
  const half = (LETTER * line.one.end.length) / 2;
  let best = null;
  for (const { x, y } of line.points) {
    const others = lines.filter((one) => one !== line).map((one) => heightAt(one, x)).filter((height) => height !== null);
    const distance = Math.min(...others.map((height) => Math.abs(height - y)));
    if (distance < ALONE || (best && distance <= best.distance) || x - half < left || x + half > right) continue;
    const probes = [-1, -0.5, 0, 0.5, 1].map((part) => x + part * half);
    const own = probes.map((at) => heightAt(line, at) ?? y);
    for (const middle of [Math.min(...own) - ROW + 2, Math.max(...own) + ROW - 2]) {
      const crossed = probes.some((at) => lines.some((one) => Math.abs((heightAt(one, at) ?? -ROW) - middle) < ROW / 2 + 2));
      if (!crossed && middle > top + 4 && middle < floor - 4) best = { x, y: middle + 4, distance };
    }
  }
  return best;
}

// The other names, in the order of their ends and so far apart that they can be read, each with a thin line to its end.
function atEdge(lines, { right, top, floor }) {
  const ends = lines.map(({ one, points }) => ({ one, ...points.at(-1), mean: points.reduce((sum, p) => sum + p.y, 0) / points.length }));
  ends.sort((a, b) => Math.round(a.y) - Math.round(b.y) || a.mean - b.mean);
  let least = top;
  for (const end of ends) least = (end.at = Math.max(end.y, least)) + ROW;
  let most = floor;
  for (const end of ends.toReversed()) most = (end.at = Math.min(end.at, most)) - ROW;
  return ends.map(({ one, x, y, at }) => svg("g", { "data-end": one.name }, svg("polyline", { points: `${x},${y} ${right + 2},${y} ${right + 14},${at}`, fill: "none", stroke: one.colour, "stroke-dasharray": "1 2" }), svg("text", { x: right + 17, y: at + 4, fill: "var(--ink)", class: "key" }, one.end)));
}
