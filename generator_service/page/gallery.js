/** @file The images that were generated in this browser, stored with their requests. */

import { copyOf, one, write } from "./dom.js";
import { summary } from "./run.js";

/** @typedef {import("./run.js").Result} Result */
/** @typedef {Result & {id: number}} StoredResult */

const DATABASE = "flux2-gallery";
const STORE = "pictures"; // renaming it would lose what browsers have stored

const list = one("#gallery ul", HTMLElement);
const note = one("#gallery-note", HTMLElement);

/** The stored images, newest first. */
export class Gallery {
  /** @type {IDBDatabase | null} */
  #database = null;
  /** @type {(result: Result) => void} */
  #repeat;

  /** @param {(result: Result) => void} repeat generates an image again */
  constructor(repeat) {
    this.#repeat = repeat;
  }

  /** Show the images that were stored before. */
  async open() {
    try {
      const opening = indexedDB.open(DATABASE, 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
      this.#database = await settled(opening);
      for (const result of await settled(this.#store("readonly").getAll())) this.#show(result);
    } catch {
      note.textContent = "This browser does not store images: download those that you want to keep.";
    }
  }

  /** @param {Result} result */
  async add(result) {
    let id = 0; // if it cannot be stored
    try {
      if (this.#database) id = Number(await settled(this.#store("readwrite").add(result)));
    } catch {
      note.textContent = "The browser's storage is full: further images are lost when the page is reloaded.";
    }
    this.#show({ ...result, id });
  }

  /**
   * @param {IDBTransactionMode} mode
   * @returns {IDBObjectStore}
   */
  #store(mode) {
    return /** @type {IDBDatabase} */ (this.#database).transaction(STORE, mode).objectStore(STORE);
  }

  /** @param {StoredResult} result */
  #show(result) {
    const { request } = result;
    const item = copyOf("#gallery-template", HTMLElement);
    const image = one("img", HTMLImageElement, item);
    const download = one(".download", HTMLAnchorElement, item);
    image.src = download.href = URL.createObjectURL(result.blob);
    image.alt = request.prompt;
    download.download = `flux2-${request.seed}-${request.cache}.${request.output_format}`;
    write(".prompt", request.prompt, item);
    write(".parameters", parameters(result), item);
    one(".repeat", HTMLElement, item).addEventListener("click", () => this.#repeat(result));
    one(".delete", HTMLElement, item).addEventListener("click", () => this.#delete(result, item));
    list.prepend(item);
  }

  /**
   * @param {StoredResult} result
   * @param {HTMLElement} item
   */
  async #delete(result, item) {
    if (this.#database) await settled(this.#store("readwrite").delete(result.id));
    const next = item.nextElementSibling ?? item.previousElementSibling;
    item.remove();
    URL.revokeObjectURL(one("img", HTMLImageElement, item).src);
    one(next ? ".delete" : "#prompt", HTMLElement, next ?? document).focus(); // the focused button was removed
  }
}

/**
 * @param {Result} result
 * @returns {string}
 */
function parameters(result) {
  const { request } = result;
  const guidance = request.guidance_scale === undefined ? [] : [`guidance ${request.guidance_scale}`];
  const images = request.images.length ? [`${request.images.length} reference images`] : [];
  return [request.cache, `${request.width} × ${request.height}`, summary(result), ...guidance, ...images].join(" · ");
}

/**
 * @template T
 * @param {IDBRequest<T>} request
 * @returns {Promise<T>}
 */
function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
