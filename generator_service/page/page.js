/** @file Ties the page together: what happens when a button is pressed. */

import { comparison } from "./compare.js";
import { one } from "./dom.js";
import * as form from "./form.js";
import { Gallery } from "./gallery.js";
import { modeToCompare } from "./modes.js";
import { Run } from "./run.js";

/** @typedef {import("./api.js").GenerateRequest} GenerateRequest */
/** @typedef {import("./run.js").Picture} Picture */

const PREVIEWS = 3;
const DRAWN_SEEDS = 2 ** 32;

const generateButton = one("#generate", HTMLButtonElement);
const cancelButton = one("#cancel", HTMLButtonElement);
const status = one("#status", HTMLElement);
const runs = one("#runs", HTMLElement);
const compared = one("#comparison", HTMLElement);
const gallery = new Gallery(repeat);

/** @type {AbortController | null} */
let running = null;

/** Draw what the form asks for, and show what comes of it. */
async function start() {
  if (running) return;
  form.clearErrors();
  running = new AbortController();
  showButtons();
  try {
    await drawAll(wanted(), running.signal);
    status.textContent = "Done";
    form.refreshModes(); // the service knows more about its speed now
  } catch (error) {
    status.textContent = running.signal.aborted ? "Cancelled" : "Not drawn";
    if (!running.signal.aborted) form.showError(error);
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
  const compareWith = modeToCompare();
  if (compareWith === undefined) return [{ ...request, previews: PREVIEWS }];
  const seed = request.seed ?? String(Math.floor(Math.random() * DRAWN_SEEDS));
  // No previews: each costs a decoding, and the times are to be compared.
  return [request.cache, compareWith].map((cache) => ({ ...request, seed, cache }));
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
  one("#legend", HTMLElement).hidden = false;
  /** @type {Picture[]} */
  const pictures = [];
  try {
    for (const panel of panels) {
      status.textContent = `Drawing: ${panel.request.cache}`;
      const picture = await panel.draw(signal);
      pictures.push(picture);
      await gallery.keep(picture);
    }
  } catch (error) {
    for (const panel of panels.slice(pictures.length)) panel.end(signal.aborted ? "Cancelled" : "Not drawn");
    throw error;
  }
  if (pictures.length === 2) compared.replaceChildren(await comparison(pictures[0], pictures[1]));
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
