/** @file The pictures that were made in this browser, with what it takes to make them again. */

import { copyOf, one, write } from "./dom.js";
import { summary } from "./run.js";

/** @typedef {import("./run.js").Picture} Picture */
/** @typedef {Picture & {id: number}} KeptPicture */

const DATABASE = "flux2-gallery";
const STORE = "pictures";

const list = one("#gallery ul", HTMLElement);
const note = one("#gallery-note", HTMLElement);

/** What is kept, newest first. */
export class Gallery {
  /** @type {IDBDatabase | null} */
  #database = null;
  /** @type {(picture: Picture) => void} */
  #repeat;

  /** @param {(picture: Picture) => void} repeat draws a picture again */
  constructor(repeat) {
    this.#repeat = repeat;
  }

  /** Show what was kept before. */
  async open() {
    try {
      const opening = indexedDB.open(DATABASE, 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore(STORE, { keyPath: "id", autoIncrement: true });
      this.#database = await settled(opening);
      for (const picture of await settled(this.#store("readonly").getAll())) this.#show(picture);
    } catch {
      note.textContent = "This browser keeps no pictures here: download what you want to keep.";
    }
  }

  /** @param {Picture} picture */
  async keep(picture) {
    let id = 0; // of a picture that is not kept
    try {
      if (this.#database) id = Number(await settled(this.#store("readwrite").add(picture)));
    } catch {
      note.textContent = "There is no room for more: pictures that are not kept are gone after a reload.";
    }
    this.#show({ ...picture, id });
  }

  /**
   * @param {IDBTransactionMode} mode
   * @returns {IDBObjectStore}
   */
  #store(mode) {
    return /** @type {IDBDatabase} */ (this.#database).transaction(STORE, mode).objectStore(STORE);
  }

  /** @param {KeptPicture} picture */
  #show(picture) {
    const { request } = picture;
    const item = copyOf("#picture-template", HTMLElement);
    const image = one("img", HTMLImageElement, item);
    const download = one(".download", HTMLAnchorElement, item);
    image.src = download.href = URL.createObjectURL(picture.blob);
    image.alt = request.prompt;
    download.download = `flux2-${request.seed}-${request.cache}.${request.output_format}`;
    write(".prompt", request.prompt, item);
    write(".parameters", parameters(picture), item);
    one(".repeat", HTMLElement, item).addEventListener("click", () => this.#repeat(picture));
    one(".delete", HTMLElement, item).addEventListener("click", () => this.#delete(picture, item));
    list.prepend(item);
  }

  /**
   * @param {KeptPicture} picture
   * @param {HTMLElement} item
   */
  async #delete(picture, item) {
    if (this.#database) await settled(this.#store("readwrite").delete(picture.id));
    const next = item.nextElementSibling ?? item.previousElementSibling;
    item.remove();
    URL.revokeObjectURL(one("img", HTMLImageElement, item).src);
    one(next ? ".delete" : "#prompt", HTMLElement, next ?? document).focus(); // the focused button is gone
  }
}

/**
 * @param {Picture} picture
 * @returns {string}
 */
function parameters(picture) {
  const { request } = picture;
  const guidance = request.guidance_scale === undefined ? [] : [`guidance ${request.guidance_scale}`];
  const images = request.images.length ? [`${request.images.length} reference images`] : [];
  return [request.cache, `${request.width} × ${request.height}`, summary(picture), ...guidance, ...images].join(" · ");
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
