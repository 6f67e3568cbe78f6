// The playground: one prompt, its answer as it comes, and the same without lookahead beside it.

import { StepChart } from "./chart.js";
import { byId, legend, make, round } from "./dom.js";
import { stream } from "./server.js";

export const SOURCES = ["jacobi", "suffix", "recycle", "grammar"];
const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "seed"];

// One answer: its text with the accepted runs marked, its speed, its steps.
class Pane {
  constructor(id, title) {
    this.section = byId(`pane-${id}`);
    this.speed = make("span", { class: "speed" });
    this.answer = make("div", { class: "answer", id: `answer-${id}`, tabindex: "0", role: "region", "aria-label": `Answer, ${title}` });
    this.values = Object.fromEntries(["tokens", "steps", "tokens per step", "first token"].map((name) => [name, make("dd", {}, "–")]));
    const figures = Object.entries(this.values).map(([name, value]) => make("div", {}, make("dt", {}, name), value));
    this.chart = new StepChart();
    this.legend = make("ul", { class: "legend" });
    this.section.append(make("h2", { id: `title-${id}` }, title, this.speed), this.answer,
      make("dl", { class: "figures" }, ...figures), this.chart.svg, this.legend);
    this.clear();
  }

  clear(note = "") {
    this.ids = [];
    this.numSteps = this.tokensPerS = 0;
    this.firstMs = undefined;
    this.seen = new Set();
    this.answer.replaceChildren(note && make("span", { class: "quiet" }, note));
    this.speed.textContent = "";
    for (const value of Object.values(this.values)) value.textContent = "–";
    this.chart.clear();
    this.legend.replaceChildren();
  }

  // Ask and show. Throws what the call throws.
  async run(path, body, signal) {
    this.clear();
    this.answer.setAttribute("aria-busy", "true");
    const began = performance.now();
    try {
      for await (const chunk of stream(path, body, signal)) this.take(chunk, performance.now() - began);
    } finally {
      this.answer.removeAttribute("aria-busy");
    }
  }

  take(chunk, ms) {
    const [choice] = chunk.choices;
    if (!choice) return;
    const text = (choice.delta ? choice.delta.content : choice.text) ?? "";
    const { num_tokens: count = 0, token_ids: ids = [], sources } = chunk.outrider ?? {};
    if (text) this.answer.append(count > 1 ? make("span", { class: "run", title: `${count} tokens in one step` }, text) : text);
    if (!count) return;
    this.firstMs ??= ms;
    this.ids.push(...ids);
    this.numSteps += 1;
    const kinds = Array.from({ length: count }, (_, index) => (index === count - 1 ? "own" : kindOf(sources?.[index])));
    kinds.reverse(); // the step's own stands at the bottom
    kinds.forEach((kind) => this.seen.add(kind));
    this.chart.push(kinds);
    this.show(ms);
  }

  show(ms) {
    const tokens = this.ids.length;
    this.tokensPerS = (1000 * (tokens - 1)) / (ms - this.firstMs); // behind the first: prompts are read once for both
    this.values.tokens.textContent = tokens;
    this.values.steps.textContent = this.numSteps;
    this.values["tokens per step"].textContent = round(tokens / this.numSteps, 2);
    this.values["first token"].textContent = `${round(this.firstMs / 1000, 2)} s`;
    this.speed.textContent = tokens > 1 ? `${round(this.tokensPerS)} tokens/s` : "";
    const names = { own: "the step’s own", accepted: "accepted", ...Object.fromEntries(SOURCES.map((name) => [name, name])) };
    this.legend.replaceChildren(...legend(Object.entries(names).filter(([kind]) => this.seen.has(kind))));
  }
}

function kindOf(source) {
  return SOURCES.includes(source) ? source : "accepted";
}

// What the form says, as the body of a call.
function call(model, lookahead) {
  const isChat = byId("form").value === "chat";
  const prompt = byId("prompt").value, system = byId("system").value;
  const messages = [...(system ? [{ role: "system", content: system }] : []), { role: "user", content: prompt }];
  const body = { model, stream: true, return_token_ids: true, ...(isChat ? { messages } : { prompt }) };
  for (const name of NUMBERS) if (byId(name).value !== "") body[name] = Number(byId(name).value);
  if (byId("stop_text").value) body.stop = [byId("stop_text").value];
  if (!lookahead) body.lookahead = { enabled: false };
  return [`v1/${isChat ? "chat/" : ""}completions`, body];
}

export class Playground {
  constructor() {
    this.on = new Pane("on", "Lookahead");
    this.off = new Pane("off", "Lookahead off");
    this.running = null;
    this.model = undefined;
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("compare").addEventListener("change", () => this.arrange());
    this.arrange();
  }

  arrange() {
    const both = byId("compare").checked;
    byId("pane-off").hidden = !both;
    document.querySelector(".panes").classList.toggle("two", both);
  }

  stop() {
    this.running?.abort();
  }

  // One after the other, since side by side each would slow down the other.
  async run() {
    this.stop();
    const running = (this.running = new AbortController());
    const both = byId("compare").checked;
    byId("problem").hidden = true;
    byId("verdict").textContent = "";
    byId("stop").disabled = false;
    this.off.clear(both ? "Waits until the one with lookahead has ended." : "");
    try {
      await this.on.run(...call(this.model, true), running.signal);
      if (both) {
        await this.off.run(...call(this.model, false), running.signal);
        byId("verdict").textContent = this.verdict();
      }
    } catch (error) {
      if (running.signal.aborted) byId("verdict").textContent = "Stopped.";
      else this.fail(error);
    } finally {
      if (this.running === running) {
        this.running = null;
        byId("stop").disabled = true;
      }
    }
  }

  verdict() {
    const same = this.on.ids.length === this.off.ids.length && this.on.ids.every((id, index) => id === this.off.ids[index]);
    const ratio = this.on.tokensPerS / this.off.tokensPerS;
    return `${same ? "The same tokens" : "The tokens differ"}, at ${round(ratio, 2)} times the speed.`;
  }

  fail(error) {
    byId("problem").textContent = error.message;
    byId("problem").hidden = false;
  }
}
