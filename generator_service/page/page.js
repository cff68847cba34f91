/** @file Ties the page together: what happens when a button is pressed. */

import { comparison } from "./compare.js";
import * as form from "./form.js";
import { Gallery } from "./gallery.js";
import { Run } from "./run.js";

/** @typedef {import("./api.js").GenerateRequest} GenerateRequest */
/** @typedef {import("./run.js").Picture} Picture */

const PREVIEWS = 3;
const DRAWN_SEEDS = 2 ** 32;

const generateButton = /** @type {HTMLButtonElement} */ (document.getElementById("generate"));
const cancelButton = /** @type {HTMLButtonElement} */ (document.getElementById("cancel"));
const status = /** @type {HTMLElement} */ (document.getElementById("status"));
const runs = /** @type {HTMLElement} */ (document.getElementById("runs"));
const compared = /** @type {HTMLElement} */ (document.getElementById("comparison"));
const gallery = new Gallery(repeat);

/** @type {AbortController | null} */
let running = null;

/** Draw what the form asks for, and show what comes of it. */
async function start() {
  if (running) return;
  form.clearErrors();
  try {
    const requests = wanted();
    running = new AbortController();
    await drawAll(requests, running.signal);
  } catch (error) {
    form.showError(/** @type {Error} */ (error));
  } finally {
    running = null;
    showButtons();
  }
}

/**
 * The requests: one, or two that differ only in their mode.
 * @returns {GenerateRequest[]}
 */
function wanted() {
  const request = form.read();
  const rival = form.readRival();
  if (rival === undefined) return [{ ...request, previews: PREVIEWS }];
  const seed = request.seed ?? String(Math.floor(Math.random() * DRAWN_SEEDS));
  // No previews: each costs a decoding, and the times are to be compared.
  return [request.cache, rival].map((cache) => ({ ...request, seed, cache }));
}

/**
 * One picture after the other: the service has one device.
 * @param {GenerateRequest[]} requests
 * @param {AbortSignal} signal
 */
async function drawAll(requests, signal) {
  const panels = requests.map((request) => new Run(request, String(request.cache ?? "picture")));
  runs.replaceChildren(...panels.map((panel) => panel.element));
  compared.replaceChildren();
  document.getElementById("legend").hidden = false;
  showButtons();
  /** @type {Picture[]} */
  const pictures = [];
  for (const panel of panels) {
    status.textContent = `Drawing: ${panel.request.cache}`;
    try {
      pictures.push(await panel.draw(signal));
    } catch (error) {
      panels.slice(pictures.length).forEach((rest) => rest.end(signal.aborted ? "Cancelled" : "Not drawn"));
      status.textContent = signal.aborted ? "Cancelled" : "Not drawn";
      if (signal.aborted) return;
      throw error;
    }
    await gallery.keep(pictures.at(-1));
  }
  if (pictures.length === 2) compared.replaceChildren(await comparison(pictures[0], pictures[1]));
  status.textContent = "Done";
  form.refreshModes(); // the service knows more about its speed now
}

/** Cancel is there as long as there is something to cancel. */
function showButtons() {
  const hadFocus = document.activeElement === cancelButton;
  cancelButton.hidden = running === null;
  generateButton.ariaDisabled = String(running !== null); // not disabled: it keeps the focus
  if (hadFocus && cancelButton.hidden) generateButton.focus();
}

/**
 * Draw a picture of the gallery again.
 * @param {Picture} picture
 */
function repeat(picture) {
  if (running) return;
  form.fill(picture.request);
  document.getElementById("result").scrollIntoView();
  start();
}

document.getElementById("form").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
cancelButton.addEventListener("click", () => running?.abort());
form.watch();
await Promise.all([form.refreshModes(), gallery.open()]);
