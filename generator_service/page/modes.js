/** @file The list of modes: the steps that each computes, and its estimated time. */

import { one } from "./dom.js";
import { duration } from "./text.js";
import { Timeline } from "./timeline.js";

/** @typedef {import("./api.js").Mode} Mode */

const list = one("#modes .modes", HTMLElement);
const compareWith = one("#compare-with", HTMLSelectElement);

/**
 * Show the modes and keep the current choice.
 * @param {Mode[]} modes
 * @param {string | number} preferred chosen if there is no choice yet
 */
export function offer(modes, preferred) {
  const chosen = chosenMode() ?? preferred;
  const focused = list.contains(document.activeElement);
  list.replaceChildren(...modes.map((mode) => row(mode)));
  choose(chosen);
  if (focused) chosenInput()?.focus();
  const compareWithName = compareWith.value;
  compareWith.replaceChildren(new Option("nothing", ""), ...modes.map(({ name }) => new Option(String(name))));
  compareWith.value = compareWithName;
}

/** @param {string | number} name */
export function choose(name) {
  for (const input of list.querySelectorAll("input")) input.checked = input.value === String(name);
}

/** @returns {string | number | undefined} undefined until the modes are shown */
export function chosenMode() {
  return asSent(chosenInput()?.value);
}

/** @returns {HTMLInputElement | undefined} */
function chosenInput() {
  return [...list.querySelectorAll("input")].find((input) => input.checked);
}

/** @returns {string | number | undefined} the mode to compare with, if one is chosen */
export function modeToCompare() {
  return compareWith.value === "" ? undefined : asSent(compareWith.value);
}

/** Clear the choice of a mode to compare with. */
export function compareWithNothing() {
  compareWith.value = "";
}

/**
 * Convert a mode's name to a value of `cache`: a number of computed steps is a number.
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
  const timeline = cell("timeline", "");
  timeline.ariaHidden = "true";
  new Timeline(timeline).show(total, computedSteps);
  label.title = schedule;
  label.append(
    input,
    cell("name", String(name)),
    timeline,
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
