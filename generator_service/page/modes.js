/** @file The choice of a mode: how many steps each computes, which they are, and how long it takes. */

import { Strip } from "./strip.js";
import { duration } from "./text.js";

/** @typedef {import("./api.js").Mode} Mode */

const list = /** @type {HTMLElement} */ (document.querySelector("#modes .modes"));
const rival = /** @type {HTMLSelectElement} */ (document.getElementById("rival"));

/**
 * Offer these modes; what was chosen stays chosen.
 * @param {Mode[]} modes
 * @param {string | number} preferred chosen if nothing is yet
 */
export function offer(modes, preferred) {
  const chosen = chosenMode() ?? preferred;
  const focused = list.contains(document.activeElement);
  list.replaceChildren(...modes.map((mode) => row(mode)));
  choose(chosen);
  if (focused) list.querySelector("input:checked")?.focus();
  const rivalName = rival.value;
  rival.replaceChildren(new Option("nothing", ""), ...modes.map(({ name }) => new Option(String(name))));
  rival.value = rivalName;
}

/** @param {string | number} name */
export function choose(name) {
  for (const input of list.querySelectorAll("input")) input.checked = input.value === String(name);
}

/** @returns {string | number | undefined} undefined as long as none is offered */
export function chosenMode() {
  return asSent(list.querySelector("input:checked")?.value);
}

/** @returns {string | number | undefined} the mode to compare with, if one is wanted */
export function rivalMode() {
  return rival.value === "" ? undefined : asSent(rival.value);
}

/**
 * As `cache` takes it: a number of computed steps is a number.
 * @param {string | undefined} name
 * @returns {string | number | undefined}
 */
function asSent(name) {
  return name !== undefined && /^\d+$/.test(name) ? Number(name) : name;
}

/**
 * @param {Mode} mode
 * @returns {HTMLElement}
 */
function row({ name, computed, total, computed_steps: computedSteps, schedule, estimate_ms: estimate }) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  input.type = "radio";
  input.name = "cache";
  input.value = String(name);
  const strip = cell("strip", "");
  strip.ariaHidden = "true";
  new Strip(strip).show(total, computedSteps);
  label.title = schedule;
  label.append(
    input,
    cell("name", String(name)),
    strip,
    cell("steps", `${computed} of ${total}`),
    cell("estimate", estimate === null ? "–" : duration(estimate)),
  );
  return label;
}

/**
 * @param {string} className
 * @param {string} text
 * @returns {HTMLElement}
 */
function cell(className, text) {
  const span = document.createElement("span");
  span.className = className;
  span.textContent = text;
  return span;
}
