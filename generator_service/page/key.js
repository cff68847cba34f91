/** @file The API key: asked for when the service wants one, kept as long as the tab. */

import { one, write } from "./dom.js";

const STORED_AS = "flux2-key";

const dialog = one("#key-dialog", HTMLDialogElement);
const field = one("#key", HTMLInputElement);
one("#key-cancel", HTMLButtonElement).addEventListener("click", () => dialog.close());

/** @type {Promise<boolean> | null} */
let asking = null; // requests that are refused together ask together

/** @returns {string | null} */
export function rememberedKey() {
  return sessionStorage.getItem(STORED_AS);
}

/**
 * Ask for a key, unless somebody gave another one meanwhile.
 * @param {string | null} refused the key that the service did not take
 * @returns {Promise<boolean>} whether there is a key to try
 */
export async function askForKey(refused) {
  if (rememberedKey() !== refused) return true;
  asking ??= openDialog(refused !== null);
  try {
    return await asking;
  } finally {
    asking = null;
  }
}

/**
 * @param {boolean} wasRefused
 * @returns {Promise<boolean>}
 */
function openDialog(wasRefused) {
  write("#key-error", wasRefused ? "The service did not take this key." : "");
  field.ariaInvalid = String(wasRefused);
  field.value = "";
  dialog.returnValue = ""; // what it stays when the dialog is left
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "use" && remember(field.value)), { once: true });
  });
}

/**
 * @param {string} key
 * @returns {boolean}
 */
function remember(key) {
  sessionStorage.setItem(STORED_AS, key);
  return true;
}
