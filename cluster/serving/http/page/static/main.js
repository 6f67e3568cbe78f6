// What holds the page together: views, theme, keys.

import { byId, make } from "./dom.js";
import { MeshView } from "./mesh.js";
import { Playground } from "./playground.js";
import { getJson } from "./server.js";

const VIEWS = ["playground", "mesh"];
const THEME = "outrider-theme";
const KEYS = [
  ["Ctrl Enter", "answer the prompt"], ["Esc", "stop the answer"], ["/", "go to the prompt"],
  ["c", "lookahead off beside it"], ["p", "parameters"], ["1, 2", "playground, mesh"], ["t", "light or dark"], ["?", "this list"],
];

const playground = new Playground();
const mesh = new MeshView();

function show(view, focus = false) {
  for (const name of VIEWS) {
    const chosen = name === view;
    byId(name).hidden = !chosen;
    byId(`tab-${name}`).setAttribute("aria-selected", String(chosen));
    byId(`tab-${name}`).tabIndex = chosen ? 0 : -1;
    if (chosen && focus) byId(`tab-${name}`).focus();
  }
  if (view === "mesh") mesh.start();
  else mesh.stop();
  history.replaceState(null, "", `#${view}`);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function changeTheme() {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  setTheme(theme);
  localStorage.setItem(THEME, theme);
}

function onKey(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    show("playground");
    playground.run();
    return;
  }
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) playground.stop();
  const isTyping = event.target.closest?.("input:not([type=checkbox]), textarea, select");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  const actions = {
    "/": () => (show("playground"), byId("prompt").focus()),
    c: () => byId("compare").click(),
    p: () => (byId("parameters").open = !byId("parameters").open),
    1: () => show("playground"),
    2: () => show("mesh"),
    t: changeTheme,
    "?": () => byId("help").showModal(),
  };
  if (event.key in actions) {
    event.preventDefault();
    actions[event.key]();
  }
}

async function describe() {
  try {
    const { model, mesh: workers, version } = await getJson("live");
    playground.model = model.id;
    byId("model").textContent = `${model.id} · ${model.dtype} on ${workers.device} · Outrider ${version}`;
  } catch (error) {
    byId("model").textContent = `not ready: ${error.message}`;
    setTimeout(describe, 2000);
  }
}

setTheme(localStorage.getItem(THEME) ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
byId("keys").append(...KEYS.flatMap(([key, meaning]) => [make("dt", {}, make("kbd", {}, key)), make("dd", {}, meaning)]));
for (const [index, name] of VIEWS.entries()) {
  byId(`tab-${name}`).addEventListener("click", () => show(name));
  byId(`tab-${name}`).addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) show(VIEWS[(index + step + VIEWS.length) % VIEWS.length], true);
  });
}
byId("theme").addEventListener("click", changeTheme);
byId("help-open").addEventListener("click", () => byId("help").showModal());
document.addEventListener("keydown", onKey);
show(VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "playground");
describe();
