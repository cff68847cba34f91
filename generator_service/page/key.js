/** @file The API key: asked for when the service wants one, kept as long as the tab. */

const STORED_AS = "flux2-key";

const dialog = /** @type {HTMLDialogElement} */ (document.getElementById("key-dialog"));
const field = /** @type {HTMLInputElement} */ (document.getElementById("key"));
const complaint = /** @type {HTMLElement} */ (document.getElementById("key-error"));
const cancel = /** @type {HTMLButtonElement} */ (document.getElementById("key-cancel"));
cancel.addEventListener("click", () => dialog.close());

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
  complaint.textContent = wasRefused ? "The service did not take this key." : "";
  field.ariaInvalid = String(wasRefused);
  field.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(remember(field.value)), { once: true });
    cancel.addEventListener("click", () => { field.value = ""; }, { once: true, capture: true });
    dialog.addEventListener("cancel", () => { field.value = ""; }, { once: true }); // Escape
  });
}

/**
 * @param {string} key
 * @returns {boolean}
 */
function remember(key) {
  if (key !== "") sessionStorage.setItem(STORED_AS, key);
  return key !== "";
}
