// Tokens per step as bars: the token that every step gives, and above it the accepted ones by their source.

import { makeSvg } from "./dom.js";

const HEIGHT = 92, FOOT = 14, HEAD = 6, LEFT = 20, WIDE = 560;

export class StepChart {
  constructor() {
    this.svg = makeSvg("svg", { class: "chart", viewBox: `0 0 ${WIDE} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.steps = [];
    this.draw();
  }

  // `kinds`: for each token of the step, what proposed it; "own": the one that every step gives.
  push(kinds) {
    this.steps.push(kinds);
    this.draw();
  }

  clear() {
    this.steps = [];
    this.draw();
  }

  draw() {
    const shown = this.steps.slice(-140);
    const most = Math.max(4, ...shown.map((kinds) => kinds.length));
    const unit = (HEIGHT - FOOT - HEAD) / most;
    const pitch = Math.min(14, (WIDE - LEFT) / Math.max(shown.length, 1));
    const bottom = HEIGHT - FOOT;
    const parts = [makeSvg("line", { class: "axis", x1: LEFT, x2: WIDE, y1: bottom + 0.5, y2: bottom + 0.5 })];
    for (const level of [1, most]) {
      parts.push(makeSvg("text", { x: LEFT - 5, y: bottom - level * unit + 8, "text-anchor": "end" }, level));
    }
    parts.push(makeSvg("text", { x: LEFT, y: HEIGHT - 2 }, "tokens of each step"));
    shown.forEach((kinds, step) => {
      kinds.forEach((kind, level) => {
        const box = { x: LEFT + step * pitch, y: bottom - (level + 1) * unit, width: pitch * 0.8, height: unit * 0.92 };
        parts.push(makeSvg("rect", { ...box, class: kind }));
      });
    });
    this.svg.replaceChildren(...parts);
    const count = this.steps.reduce((sum, kinds) => sum + kinds.length, 0);
    this.svg.setAttribute("aria-label", `${count} tokens in ${this.steps.length} steps`);
  }
}

// A small line of the last values.
export function sparkline(values) {
  const most = Math.max(...values, 1e-9);
  const points = values.map((value, index) => `${(index / Math.max(values.length - 1, 1)) * 100},${25 - (value / most) * 23}`);
  return makeSvg("svg", { viewBox: "0 0 100 26", preserveAspectRatio: "none", "aria-hidden": "true" },
    makeSvg("polyline", { points: points.join(" "), "vector-effect": "non-scaling-stroke" }));
}
