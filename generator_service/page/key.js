/** @file The API key: entered in a dialog when the service requires one, and stored until the tab is closed. */

import { one, write } from "./dom.js";

const STORED_AS = "flux2-key";

const dialog = one("#key-dialog", HTMLDialogElement);
const field = one("#key", HTMLInputElement);
one("#key-cancel", HTMLButtonElement).addEventListener("click", () => dialog.close());

/** @type {Promise<boolean> | null} */
let asking = null; // concurrent requests share one dialog

/** @returns {string | null} */
export function rememberedKey() {
  return sessionStorage.getItem(STORED_AS);
}

/**
 * Ask for a key, unless another one was entered meanwhile.
 * @param {string | null} refused the key that the service rejected
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
  write("#key-error", wasRefused ? "The service rejected this key." : "");
  field.ariaInvalid = String(wasRefused);
  field.value = "";
  dialog.returnValue = ""; // remains empty if the dialog is dismissed
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
