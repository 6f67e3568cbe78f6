// The live view: what the workers do now, from the server's counters, twice a second while it is looked at.

import { sparkline } from "./chart.js";
import { byId, legend, make, makeSvg, round } from "./dom.js";
import { SOURCES } from "./playground.js";
import { getJson } from "./server.js";

const EVERY_MS = 500, KEPT = 120;
const TILES = [
  ["running", "answers running", 0], ["waiting", "waiting", 0], ["tokensPerS", "tokens/s", 1],
  ["stepsPerS", "steps/s", 1], ["rows", "rows per step", 1], ["tokens", "tokens per step", 2],
];
const SLOT_KINDS = [["running", "running"], ["held", "held by a conversation"], ["left", "left, may be reused"]];

export class MeshView {
  constructor() {
    this.history = [];
    this.before = null;
    this.timer = null;
    byId("slots-legend").append(...legend(SLOT_KINDS));
  }

  start() {
    this.stop();
    this.refresh();
    this.timer = setInterval(() => this.refresh(), EVERY_MS);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
  }

  async refresh() {
    if (this.busy || document.hidden) return;
    this.busy = true;
    try {
      const now = await getJson("live");
      byId("mesh-problem").hidden = true;
      this.take(now);
    } catch (error) {
      byId("mesh-problem").textContent = `The server cannot be asked: ${error.message}`;
      byId("mesh-problem").hidden = false;
      } finally {
      this.busy = false;
    }
  }

  take(now) {
    const values = this.rates(now);
    this.history = [...this.history, values].slice(-KEPT);
    this.before = now;
    byId("tiles").replaceChildren(...TILES.map(([key, name, digits]) => make("div", { class: "tile" },
      make("p", { class: "name" }, name), make("p", { class: "value", "data-figure": key }, round(values[key], digits)),
      sparkline(this.history.map((each) => each[key])))));
    this.showWorkers(now, values);
    this.showSlots(now);
    this.showShares("phases", now.seconds_by_phase, (value, sum) => `${round((100 * value) / sum, 0)} %`);
    this.showSources(now.sources);
  }

  // What has happened since the last look; where no step has, what was so far.
  rates(now) {
    const before = this.before ?? { ...now, time_s: now.time_s - 1 };
    const seconds = now.time_s - before.time_s || 1;
    const [steps, rows, tokens] = ["num_steps", "num_rows", "num_tokens"].map((key) => Math.max(now[key] - before[key], 0));
    return {
      running: now.num_running, waiting: now.num_waiting, tokensPerS: tokens / seconds, stepsPerS: steps / seconds,
      rows: steps ? rows / steps : 0, tokens: steps ? tokens / steps : 0,
    };
  }

  showWorkers(now, values) {
    const { lp, tp, device } = now.mesh;
    byId("workers-note").textContent = `lp ${lp} × tp ${tp} on ${device}: replicas share a step’s rows, ranks the weights of a replica`;
    const rows = round(values.rows / lp, 1);
    byId("workers").replaceChildren(...Array.from({ length: lp }, (_, replica) => make("div", { class: "replica" },
      ...Array.from({ length: tp }, (_, rank) => make("span", { class: `rank ${values.stepsPerS ? "busy" : ""}` }, `replica ${replica}, rank ${rank}`)),
      make("span", { class: "quiet" }, `about ${rows} rows a step`))));
  }

  showSlots(now) {
    const { slots, num_slots: count, most_tokens: most, policy, bytes_per_token: bytes } = now.cache;
    const bySlot = new Map(slots.map((slot) => [slot.slot, slot]));
    const tokens = slots.reduce((sum, slot) => sum + slot.num_tokens, 0);
    byId("slots-note").textContent = `${slots.length} of ${count} in use, policy ${policy}, ${tokens} tokens, ${round((tokens * bytes) / 2 ** 20)} MiB on the fullest worker`;
    byId("slots").replaceChildren(...Array.from({ length: count }, (_, index) => {
      const slot = bySlot.get(index);
      const share = slot ? Math.max(0.06, Math.sqrt(Math.min(slot.num_tokens / most, 1))) : 0; // short texts are to be seen, too
      const title = slot ? `slot ${index}: ${slot.num_tokens} tokens, ${slot.state}` : `slot ${index}: free`;
      return make("div", { class: "slot", title }, makeSvg("svg", { viewBox: "0 0 10 100", preserveAspectRatio: "none", "aria-hidden": "true" },
        makeSvg("rect", { x: 0, y: 100 * (1 - share), width: 10, height: 100 * share, class: slot?.state ?? "free" })));
    }));
  }

  showShares(id, values, text, kind = () => "share") {
    const sum = Object.values(values).reduce((total, value) => total + value, 0);
    byId(id).replaceChildren(make("dl", { class: "bars" }, ...Object.entries(values).flatMap(([name, value]) => [
      make("dt", {}, name),
      makeSvg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
        makeSvg("rect", { width: sum ? (100 * value) / sum : 0, height: 10, class: kind(name) })),
      make("dd", {}, sum ? text(value, sum, name) : "–"),
    ])));
  }

  showSources(sources) {
    const accepted = Object.fromEntries(SOURCES.filter((name) => name in sources).map((name) => [name, sources[name].accepted]));
    const text = (value, _, name) => `${value} of ${sources[name].proposed} accepted`;
    this.showShares("sources", accepted, text, (name) => name);
  }
}
