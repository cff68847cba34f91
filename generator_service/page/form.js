/** @file The form: reads requests from its fields, fills them from a request, and shows errors at the fields. */

import { ServiceError, readModes } from "./api.js";
import { one, write } from "./dom.js";
import { choose, chosenMode, compareWithNothing, offer } from "./modes.js";
import { References } from "./references.js";

/** @typedef {import("./api.js").GenerateRequest} GenerateRequest */

const NUMBERS = /** @type {const} */ (["width", "height", "num_inference_steps", "guidance_scale"]);
/** Always sent explicitly, so that an image can be repeated after the service's defaults have changed. */
const RECORDED = /** @type {const} */ (["num_inference_steps", "guidance_scale"]);
const WAIT_FOR_TYPING_MS = 250;

const element = one("#form", HTMLFormElement);
const prompt = one("#prompt", HTMLTextAreaElement);
const format = one("#output_format", HTMLSelectElement);
const references = new References((text) => mark("images", text), refreshModes);

/**
 * Find an input element by its name.
 * @param {string} name
 * @returns {HTMLInputElement}
 */
function field(name) {
  return one(`#${name}`, HTMLInputElement);
}

/**
 * Read the request from the form.
 * @returns {GenerateRequest}
 */
export function read() {
  if (prompt.value.trim() === "") throw new ServiceError("Enter a prompt.", "prompt");
  /** @type {GenerateRequest} */
  const request = {
    prompt: prompt.value,
    output_format: format.value,
    images: references.uris,
    cache: chosenMode(),
    seed: field("seed").value.trim() || undefined,
  };
  for (const name of NUMBERS) {
    if (field(name).validity.badInput) throw new ServiceError("This must be a number.", name);
    if (field(name).value !== "") request[name] = Number(field(name).value);
  }
  for (const name of RECORDED) {
    if (field(name).placeholder !== "") request[name] ??= Number(field(name).placeholder);
  }
  return request;
}

/**
 * Fill the form with the request of an earlier image.
 * @param {GenerateRequest} request
 */
export function fill(request) {
  prompt.value = request.prompt;
  format.value = request.output_format;
  for (const name of /** @type {const} */ (["seed", ...NUMBERS])) field(name).value = String(request[name] ?? "");
  references.uris = request.images;
  if (request.cache !== undefined) choose(request.cache);
  compareWithNothing();
}

/**
 * Show an error at its field, and focus the field.
 * @param {unknown} error
 */
export function showError(error) {
  const param = report(error);
  if (param !== undefined) one(`[name=${param}]`, HTMLElement, element).focus();
}

/**
 * Show an error at its field, or below the form.
 * @param {unknown} error
 * @returns {string | undefined} the field's name
 */
function report(error) {
  const message = error instanceof Error ? error.message : String(error);
  const param = error instanceof ServiceError ? error.param?.replace(/\[\d+\]$/, "") : undefined;
  if (param === undefined || document.getElementById(`${param}-error`) === null) {
    write("#error", message);
    return undefined;
  }
  mark(param, message);
  return param;
}

/** Remove all error messages. */
export function clearErrors() {
  for (const problem of element.querySelectorAll(".problem")) problem.textContent = "";
  for (const input of element.querySelectorAll("[aria-invalid]")) input.ariaInvalid = "false";
}

/**
 * @param {string} param
 * @param {string} text
 */
function mark(param, text) {
  write(`#${param}-error`, text);
  const input = document.getElementById(param); // the modes are several elements
  if (input) input.ariaInvalid = String(text !== "");
}

/** @type {AbortController} */
let refreshing = new AbortController();

/**
 * Update the modes and their estimates for the current size and steps.
 * @returns {Promise<void>}
 */
export async function refreshModes() {
  refreshing.abort();
  refreshing = new AbortController();
  const { signal } = refreshing;
  try {
    const parameters = Object.fromEntries(NUMBERS.map((name) => [name, field(name).value]));
    await showModes(parameters, references.sizes, signal);
    for (const name of NUMBERS) mark(name, "");
  } catch (error) {
    if (signal.aborted) return;
    report(error); // without moving the focus while the user types
    const isRefused = error instanceof ServiceError && error.param !== null;
    if (isRefused && chosenMode() === undefined) await showModes({}, [], signal).catch(report); // to have a choice
  }
}

/**
 * Show the modes and their estimates for some parameters, and the service's defaults.
 * @param {Record<string, string>} parameters
 * @param {string[]} sizes of the reference images
 * @param {AbortSignal} signal
 */
async function showModes(parameters, sizes, signal) {
  const response = await readModes(parameters, sizes, signal);
  for (const name of NUMBERS) field(name).placeholder = String(response.default[name]);
  write("#model", response.model);
  offer(response.modes, response.default.cache);
}

/** Refresh the modes when a field changes, and submit the form by Ctrl+Enter. */
export function watch() {
  let timer = 0;
  for (const name of NUMBERS) {
    field(name).addEventListener("input", () => {
      clearTimeout(timer);
      timer = setTimeout(refreshModes, WAIT_FOR_TYPING_MS);
    });
  }
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element.requestSubmit();
  });
}
