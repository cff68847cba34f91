/** @file The pictures that were made in this browser, with what it takes to make them again. */

import { summary } from "./run.js";

/** @typedef {import("./run.js").Picture} Picture */
/** @typedef {Picture & {id: number}} KeptPicture */

const DATABASE = "flux2-gallery";
const STORE = "pictures";

const list = /** @type {HTMLElement} */ (document.querySelector("#gallery ul"));
const note = /** @type {HTMLElement} */ (document.getElementById("gallery-note"));
const template = /** @type {HTMLTemplateElement} */ (document.getElementById("picture-template"));

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
    const fragment = /** @type {DocumentFragment} */ (template.content.cloneNode(true));
    const item = /** @type {HTMLElement} */ (fragment.querySelector("li"));
    const image = /** @type {HTMLImageElement} */ (item.querySelector("img"));
    const download = /** @type {HTMLAnchorElement} */ (item.querySelector(".download"));
    const { request } = picture;
    image.src = download.href = URL.createObjectURL(picture.blob);
    image.alt = request.prompt;
    image.width = request.width;
    image.height = request.height;
    download.download = `flux2-${request.seed}-${request.cache}.${request.output_format}`;
    item.querySelector(".prompt").textContent = request.prompt;
    item.querySelector(".parameters").textContent = parameters(picture);
    item.querySelector(".repeat").addEventListener("click", () => this.#repeat(picture));
    item.querySelector(".delete").addEventListener("click", () => this.#delete(picture, item, image));
    list.prepend(item);
  }

  /**
   * @param {KeptPicture} picture
   * @param {HTMLElement} item
   * @param {HTMLImageElement} image
   */
  async #delete(picture, item, image) {
    if (this.#database) await settled(this.#store("readwrite").delete(picture.id));
    const next = item.nextElementSibling ?? item.previousElementSibling;
    item.remove();
    URL.revokeObjectURL(image.src);
    (next?.querySelector(".delete") ?? document.getElementById("prompt")).focus(); // the focused button is gone
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
