// Making elements. What a server or a model says goes in as text only, never as markup.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

// An element with attributes and children; a child that is no element becomes text.
export function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function makeSvg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) element.setAttribute(key, value);
  }
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

// A coloured square and its name.
export function legend(entries) {
  return entries.map(([kind, name]) =>
    make("li", {}, makeSvg("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, makeSvg("rect", { width: 10, height: 10, class: kind })), name));
}

export function round(value, digits = 1) {
  return Number.isFinite(value) ? value.toFixed(digits) : "–";
}
