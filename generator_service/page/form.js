/** @file The form: from its fields to a request, from a request to its fields, and errors at the field they are about. */

import { ServiceError, readModes } from "./api.js";
import { one, write } from "./dom.js";
import { choose, chosenMode, compareWithNothing, offer } from "./modes.js";
import { References } from "./references.js";

/** @typedef {import("./api.js").GenerateRequest} GenerateRequest */

const NUMBERS = /** @type {const} */ (["width", "height", "num_inference_steps", "guidance_scale"]);
/** Sent also where the service's default will do, so that a picture can be repeated when defaults have changed. */
const RECORDED = /** @type {const} */ (["num_inference_steps", "guidance_scale"]);
const WAIT_FOR_TYPING_MS = 250;

const element = one("#form", HTMLFormElement);
const prompt = one("#prompt", HTMLTextAreaElement);
const format = one("#output_format", HTMLSelectElement);
const references = new References((text) => mark("images", text));

/**
 * A field with one line of text.
 * @param {string} name
 * @returns {HTMLInputElement}
 */
function field(name) {
  return one(`#${name}`, HTMLInputElement);
}

/**
 * What the form asks for.
 * @returns {GenerateRequest}
 */
export function read() {
  if (prompt.value.trim() === "") throw new ServiceError("Say what to draw.", "prompt");
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
 * Fill in what a picture was made with.
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
 * Tell an error where it belongs, and lead the user there.
 * @param {unknown} error
 */
export function showError(error) {
  const param = tell(error);
  if (param !== undefined) one(`[name=${param}]`, HTMLElement, element).focus();
}

/**
 * Tell an error at the field that it is about, or below the form.
 * @param {unknown} error
 * @returns {string | undefined} the field's name
 */
function tell(error) {
  const message = error instanceof Error ? error.message : String(error);
  const param = error instanceof ServiceError ? error.param?.replace(/\[\d+\]$/, "") : undefined;
  if (param === undefined || document.getElementById(`${param}-error`) === null) {
    write("#error", message);
    return undefined;
  }
  mark(param, message);
  return param;
}

/** Nothing is wrong any more, or nobody has looked. */
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
  const input = document.getElementById(param); // a mode is several
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
    write("#model", told.model);
    offer(told.modes, told.default.cache);
  } catch (error) {
    if (!signal.aborted) tell(error); // and leave the focus to who is typing
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
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element.requestSubmit();
  });
}
