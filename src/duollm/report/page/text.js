// Text of tens of thousands of tokens: only the blocks near the screen hold elements, the others keep their height.

import { branch, hasRoute, indexOf } from "./decode.js";
import { el, svg, visible } from "./dom.js";

const LONGEST = 96;
const BUDGET = 6; // milliseconds of drawing per frame: what is far from the screen can wait for the next one
const LANE = 5;

// Cut a domain into blocks of consecutive rows: windows, and long windows at line ends.
export function blocksOf(domain) {
  const blocks = [];
  for (let w = 0; w < domain.window.length; w++) {
    const end = domain.window[w + 1] ?? domain.size;
    for (let from = domain.window[w]; from < end; ) {
      const to = cut(domain.text, from, end);
      blocks.push({ from, to });
      from = to;
    }
  }
  return blocks;
}

function cut(text, from, end) {
  if (end - from <= LONGEST) return end;
  for (let t = from + LONGEST - 1; t > from + LONGEST / 2; t--) if (text[t].includes("\n")) return t + 1;
  return from + LONGEST;
}

export class TextView {
  // paint: {panes: [{colour(t), policy, name}], dim(t), found(t), layer, lanes}; pane 0 is the chosen policy.
  constructor(holder, domain, paint) {
    Object.assign(this, { holder, domain, paint, current: null, pins: [], near: new Set() });
    this.observer = new IntersectionObserver((entries) => this.seen(entries), { rootMargin: "700px 0px" });
    this.blocks = blocksOf(domain);
    const perLine = Math.max(20, Math.floor((holder.clientWidth || 700) / 9));
    const starts = new Map(domain.document.map((row, i) => [row, domain.documents[i]]));
    const nodes = this.blocks.map((block, i) => {
      const text = domain.text.slice(block.from, block.to).join("");
      const lines = text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / perLine)), 0);
      block.node = el("div", { class: "block", "data-block": i, style: `min-height:${lines * 25 + 20}px` });
      if (starts.has(block.from)) block.title = starts.get(block.from);
      return block.node;
    });
    holder.replaceChildren(...nodes);
    nodes.forEach((node) => this.observer.observe(node));
  }

  seen(entries) {
    for (const { target, isIntersecting, boundingClientRect } of entries) {
      const block = this.blocks[target.dataset.block];
      if (isIntersecting) this.near.add(block);
      else {
        this.near.delete(block);
        if (block.drawn) block.node.style.minHeight = `${boundingClientRect.height}px`;
        if (block.drawn) target.replaceChildren();
        block.drawn = false;
      }
    }
    this.drawSome();
  }

  drawSome() {
    const start = performance.now();
    for (const block of this.near) {
      if (performance.now() - start > BUDGET) break;
      this.near.delete(block);
      if (!block.drawn) this.draw(block);
    }
    if (this.near.size && !this.waiting) this.waiting = requestAnimationFrame(() => ((this.waiting = 0), this.drawSome()));
  }

  draw(block) {
    block.drawn = true;
    const panes = this.paint.panes.map((pane) => this.pane(block, pane));
    const heading = block.title ? el("h2", { class: "document" }, block.title) : null;
    block.node.replaceChildren(...[heading, el("div", { class: panes.length > 1 ? "panes two" : "panes" }, panes)].filter(Boolean));
    block.node.style.minHeight = "";
  }

  pane(block, { colour, policy, name }) {
    const { dim, found, layer, lanes } = this.paint;
    const words = el("p", { class: "words" });
    for (let t = block.from; t < block.to; t++) {
      const word = el("span", { "data-t": t, style: dim(t) ? null : `background:${colour(t)}` }, visible(this.domain.text[t]));
      if (dim(t)) word.classList.add("dim");
      if (found(t)) word.classList.add("found");
      if (layer >= 0 && hasRoute(policy, t) && branch(policy, t, layer) === 2) word.classList.add("on");
      if (t === this.current) word.classList.add("current");
      if (this.pins.includes(t)) word.classList.add("pinned");
      words.append(word);
    }
    const label = this.paint.panes.length > 1 ? el("b", { class: "panename" }, name) : null;
    return el("div", {}, label, words, lanes && policy.routes ? this.lanes(block, policy) : null);
  }

  // Branch by layer under the words: a column per token, a row per layer, layer 0 on top.
  lanes(block, policy) {
    const { layers } = policy.domain;
    const size = block.to - block.from;
    const paths = ["", "", ""];
    for (let t = block.from; t < block.to; t++) {
      for (let l = 0; l < layers && hasRoute(policy, t); l++) paths[branch(policy, t, l)] += `M${t - block.from} ${l}h1v1h-1z`;
    }
    const picture = svg("svg", { class: "lanes", viewBox: `0 0 ${size} ${layers}`, preserveAspectRatio: "none", height: layers * LANE, "data-from": block.from, "aria-hidden": "true" });
    paths.forEach((d, b) => d && picture.append(svg("path", { d, class: `branch${b}` })));
    const { layer } = this.paint;
    if (layer >= 0) picture.append(svg("rect", { x: 0, y: layer, width: size, height: 1, class: "scrub" }));
    return picture;
  }

  repaint(paint) {
    this.paint = paint;
    for (const block of this.blocks) if (block.drawn) this.draw(block);
  }

  mark(name, rows) {
    this.holder.querySelectorAll(`.${name}`).forEach((word) => word.classList.remove(name));
    for (const t of rows) this.holder.querySelectorAll(`[data-t="${t}"]`).forEach((word) => word.classList.add(name));
  }

  focus(t) {
    this.current = t;
    this.mark("current", t === null ? [] : [t]);
  }

  reveal(t) {
    const block = this.blocks[indexOf(this.blocks.map((one) => one.from), t)];
    if (!block.drawn) this.draw(block);
    this.focus(t);
    block.node.querySelector(`[data-t="${t}"]`).scrollIntoView({ block: "center" });
  }

  close() {
    this.observer.disconnect();
  }
}
