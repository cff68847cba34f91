/** @file The form: from its fields to a request, from a request to its fields, and errors at the field they are about. */

import { ServiceError, readModes } from "./api.js";
import { choose, chosenMode, offer, rivalMode } from "./modes.js";
import { References } from "./references.js";

/** @typedef {import("./api.js").GenerateRequest} GenerateRequest */

const NUMBERS = ["width", "height", "num_inference_steps", "guidance_scale"];
const WAIT_FOR_TYPING_MS = 250;

const element = /** @type {HTMLFormElement} */ (document.getElementById("form"));
const general = /** @type {HTMLElement} */ (document.getElementById("error"));
const references = new References((text) => mark("images", text));

/** @param {string} name */
function field(name) {
  return /** @type {HTMLInputElement} */ (document.getElementById(name));
}

/**
 * What the form asks for.
 * @returns {GenerateRequest}
 */
export function read() {
  if (field("prompt").value.trim() === "") throw new ServiceError("Say what to draw.", "prompt");
  const request = {
    prompt: field("prompt").value,
    output_format: field("output_format").value,
    images: references.uris,
    cache: chosenMode(),
    seed: field("seed").value.trim() || undefined,
  };
  for (const name of NUMBERS) {
    if (field(name).validity.badInput) throw new ServiceError("This must be a number.", name);
    if (field(name).value !== "") request[name] = Number(field(name).value);
  }
  return request;
}

/** @returns {string | number | undefined} the mode to compare with, if one is wanted */
export function readRival() {
  return rivalMode();
}

/**
 * Fill in what a picture was made with.
 * @param {GenerateRequest} request
 */
export function fill(request) {
  for (const name of ["prompt", "output_format", "seed", ...NUMBERS]) field(name).value = String(request[name] ?? "");
  references.uris = request.images;
  if (request.cache !== undefined) choose(request.cache);
  field("rival").value = "";
  clearErrors();
}

/**
 * Tell an error at the field that it is about, or below the form, and lead the user there.
 * @param {Error} error
 */
export function showError(error) {
  const param = error instanceof ServiceError ? error.param?.replace(/\[\d+\]$/, "") : undefined;
  const place = param && document.getElementById(`${param}-error`);
  if (!place) {
    general.textContent = error.message;
    return;
  }
  mark(param, error.message);
  (document.getElementById(param) ?? element.querySelector(`[name=${param}]`))?.focus();
}

/** Nothing is wrong any more, or nobody has looked. */
export function clearErrors() {
  general.textContent = "";
  for (const problem of element.querySelectorAll(".problem[id$='-error']")) mark(problem.id.slice(0, -6), "");
}

/**
 * @param {string} param
 * @param {string} text
 */
function mark(param, text) {
  document.getElementById(`${param}-error`).textContent = text;
  const input = document.getElementById(param);
  if (input) input.ariaInvalid = String(text !== "");
}

/** @type {AbortController} */
let refreshing = new AbortController();

/**
 * Ask what the modes would take now, and show it.
 * @returns {Promise<void>}
 */
export async function refreshModes() {
  refreshing.abort();
  refreshing = new AbortController();
  const { signal } = refreshing;
  try {
    const picture = Object.fromEntries(NUMBERS.map((name) => [name, field(name).value]));
    const told = await readModes(picture, signal);
    for (const name of NUMBERS) {
      mark(name, "");
      field(name).placeholder = String(told.default[name]);
    }
    document.getElementById("model").textContent = told.model;
    offer(told.modes, told.default.cache);
  } catch (error) {
    if (signal.aborted) return;
    if (error instanceof ServiceError && error.param) mark(error.param, error.message);
    else showError(/** @type {Error} */ (error));
  }
}

/** Keep the modes' figures up to date with the fields. */
export function watch() {
  let timer = 0;
  for (const name of NUMBERS) {
    field(name).addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(refreshModes, WAIT_FOR_TYPING_MS);
    });
  }
  field("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element.requestSubmit();
  });
}
