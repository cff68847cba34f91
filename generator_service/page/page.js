/** @file The entry point of the page: handles the buttons. */

import { comparison } from "./compare.js";
import { one } from "./dom.js";
import * as form from "./form.js";
import { Gallery } from "./gallery.js";
import { modeToCompare } from "./modes.js";
import { Run } from "./run.js";

/** @typedef {import("./api.js").GenerateRequest} GenerateRequest */
/** @typedef {import("./run.js").Result} Result */

const PREVIEWS = 3;
const NUM_SEEDS = 2 ** 32;

const generateButton = one("#generate", HTMLButtonElement);
const cancelButton = one("#cancel", HTMLButtonElement);
const status = one("#status", HTMLElement);
const runs = one("#runs", HTMLElement);
const compared = one("#comparison", HTMLElement);
const gallery = new Gallery(repeat);

/** @type {AbortController | null} */
let running = null;

/** Generate what the form requests, and show the results. */
async function start() {
  if (running) return;
  form.clearErrors();
  running = new AbortController();
  showButtons();
  try {
    await generateAll(requests(), running.signal);
    status.textContent = "Done";
    form.refreshModes(); // the service's estimates may have changed
  } catch (error) {
    status.textContent = running.signal.aborted ? "Cancelled" : "Failed";
    if (!running.signal.aborted) form.showError(error);
  } finally {
    running = null;
    showButtons();
  }
}

/**
 * Build one request, or two that differ only in their mode.
 * @returns {GenerateRequest[]}
 */
function requests() {
  const request = form.read();
  const compareWith = modeToCompare();
  if (compareWith === undefined) return [{ ...request, previews: PREVIEWS }];
  const seed = request.seed ?? String(Math.floor(Math.random() * NUM_SEEDS));
  // Without previews, which take time to decode, so that the times can be compared.
  return [request.cache, compareWith].map((cache) => ({ ...request, seed, cache }));
}

/**
 * Generate one image after the other, because the service has one device.
 * @param {GenerateRequest[]} all
 * @param {AbortSignal} signal
 */
async function generateAll(all, signal) {
  const panels = all.map((request) => new Run(request, String(request.cache ?? "image")));
  runs.replaceChildren(...panels.map((panel) => panel.element));
  compared.replaceChildren();
  one("#legend", HTMLElement).hidden = false;
  /** @type {Result[]} */
  const results = [];
  try {
    for (const panel of panels) {
      status.textContent = `Generating: ${panel.request.cache}`;
      const result = await panel.start(signal);
      results.push(result);
      await gallery.add(result);
    }
  } catch (error) {
    for (const panel of panels.slice(results.length)) panel.end(signal.aborted ? "Cancelled" : "Failed");
    throw error;
  }
  if (results.length === 2) compared.replaceChildren(await comparison(results[0], results[1]));
}

/** Show the cancel button while a request is running. */
function showButtons() {
  const hadFocus = document.activeElement === cancelButton;
  cancelButton.hidden = running === null;
  generateButton.ariaDisabled = String(running !== null); // instead of disabled, so that it keeps the focus
  if (hadFocus && cancelButton.hidden) generateButton.focus();
}

/**
 * Generate an image of the gallery again.
 * @param {Result} result
 */
function repeat(result) {
  if (running) return;
  form.fill(result.request);
  one("#result", HTMLElement).scrollIntoView();
  start();
}

one("#form", HTMLFormElement).addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
cancelButton.addEventListener("click", () => running?.abort());
form.watch();
await Promise.all([form.refreshModes(), gallery.open()]);
