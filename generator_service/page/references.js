/** @file Reference images: dropped, pasted or chosen, shown as thumbnails, sent as data URIs. */

import { one } from "./dom.js";

const TYPES = ["image/png", "image/jpeg", "image/webp"];

/** The reference images of the next request. */
export class References {
  /** @type {string[]} */
  #uris = [];
  #drop = one("#drop", HTMLElement);
  #list = one("#thumbnails", HTMLElement);
  #input = one("#images", HTMLInputElement);
  /** @type {(text: string) => void} */
  #showError;
  /** @type {() => void} */
  #onChange;

  /**
   * @param {(text: string) => void} showError shows a problem with a file; "" clears it
   * @param {() => void} onChange called when the images, or their sizes, have changed
   */
  constructor(showError, onChange) {
    this.#showError = showError;
    this.#onChange = onChange;
    this.#input.addEventListener("change", async () => {
      await this.#add(this.#input.files ?? []);
      this.#input.value = ""; // so that the same file can be chosen again after it was removed
    });
    this.#drop.addEventListener("drop", (event) => {
      event.preventDefault();
      this.#drop.classList.remove("over");
      this.#add(event.dataTransfer?.files ?? []);
    });
    this.#drop.addEventListener("dragover", (event) => {
      event.preventDefault();
      this.#drop.classList.add("over");
    });
    this.#drop.addEventListener("dragleave", () => this.#drop.classList.remove("over"));
    document.addEventListener("paste", (event) => {
      if (event.clipboardData?.files.length) this.#add(event.clipboardData.files);
    });
  }

  /** @returns {string[]} */
  get uris() {
    return [...this.#uris];
  }

  /** @param {string[]} uris */
  set uris(uris) {
    this.#uris = [...uris];
    this.#show();
  }

  /** @returns {string[]} the sizes of the images that are loaded, as WIDTHxHEIGHT */
  get sizes() {
    const images = [...this.#list.querySelectorAll("img")].filter((image) => image.naturalWidth > 0);
    return images.map((image) => `${image.naturalWidth}x${image.naturalHeight}`);
  }

  /** @param {Iterable<File>} files */
  async #add(files) {
    const refused = [...files].filter((file) => !TYPES.includes(file.type));
    this.#showError(refused.length ? `${refused[0].name} is neither a PNG, a JPEG nor a WebP file.` : "");
    const accepted = [...files].filter((file) => TYPES.includes(file.type));
    this.uris = [...this.#uris, ...(await Promise.all(accepted.map(dataUri)))];
  }

  /** @param {number} position */
  #remove(position) {
    this.uris = this.#uris.filter((_, k) => k !== position);
    const buttons = this.#list.querySelectorAll("button");
    (buttons[Math.min(position, buttons.length - 1)] ?? this.#input).focus(); // the focused button was removed
  }

  #show() {
    this.#list.replaceChildren(...this.#uris.map((uri, k) => this.#thumbnail(uri, k)));
    if (!this.#uris.length) this.#onChange(); // else when the thumbnails are loaded
  }

  /**
   * @param {string} uri
   * @param {number} position
   * @returns {HTMLElement}
   */
  #thumbnail(uri, position) {
    const item = document.createElement("li");
    const image = document.createElement("img");
    const button = document.createElement("button");
    image.addEventListener("load", () => this.#onChange());
    image.src = uri;
    image.alt = `Reference image ${position + 1}`;
    button.type = "button";
    button.ariaLabel = `Remove reference image ${position + 1}`;
    button.textContent = "×";
    button.addEventListener("click", () => this.#remove(position));
    item.append(image, button);
    return item;
  }
}

/**
 * @param {File} file
 * @returns {Promise<string>}
 */
function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(/** @type {string} */ (reader.result)));
    reader.addEventListener("error", () => reject(reader.error));
    reader.readAsDataURL(file);
  });
}
