/** @file One picture on its way: its steps, its previews, the time left, and at last the picture. */

import { generate } from "./api.js";
import { Strip } from "./strip.js";
import { duration } from "./text.js";

/** @typedef {import("./api.js").GenerateRequest} GenerateRequest */

/**
 * A finished picture and how it was made.
 * @typedef {object} Picture
 * @property {Blob} blob
 * @property {GenerateRequest} request complete: sent again, it gives the same picture
 * @property {number} computed
 * @property {number} total
 * @property {string} schedule
 * @property {number} milliseconds denoising and decoding
 */

const template = /** @type {HTMLTemplateElement} */ (document.getElementById("run-template"));

/** A panel for one picture. */
export class Run {
  /**
   * @param {GenerateRequest} request
   * @param {string} title
   */
  constructor(request, title) {
    this.request = request;
    this.element = /** @type {HTMLElement} */ (template.content.cloneNode(true)).querySelector("article");
    this.element.querySelector("h3").textContent = title;
    this.image = /** @type {HTMLImageElement} */ (this.element.querySelector("img"));
    this.now = this.element.querySelector(".now");
    this.strip = new Strip(this.element.querySelector(".strip"));
    this.now.textContent = "Waiting for its turn";
  }

  /**
   * Have it drawn.
   * @param {AbortSignal} signal
   * @returns {Promise<Picture>}
   */
  async draw(signal) {
    for await (const { name, data } of generate(this.request, signal)) {
      if (name === "step") this.#showStep(data);
      else if (name === "preview") this.#showPreview(data);
      else if (name === "completed") return this.#complete(data);
    }
    throw new Error("The service ended the connection before the picture was there.");
  }

  /** @param {string} text why there is no picture */
  end(text) {
    this.now.textContent = text;
  }

  /** @param {{step: number, total: number, computed: boolean, eta_ms?: number}} event */
  #showStep({ step, total, computed, eta_ms: left }) {
    if (step === 0) this.strip.begin(total);
    this.strip.mark(step, computed);
    const kind = computed ? "computed" : "reused";
    const eta = left === undefined ? "" : ` · ${duration(left)} left`;
    this.now.textContent = `Step ${step + 1} of ${total}, ${kind}${eta}`;
  }

  /** @param {{number: number, image: string}} event */
  #showPreview({ number, image }) {
    this.image.src = `data:image/jpeg;base64,${image}`;
    this.image.alt = `Preview ${number + 1} of: ${this.request.prompt}`;
    this.image.dataset.preview = String(number);
    this.image.hidden = false;
  }

  /**
   * @param {Record<string, string>} event
   * @returns {Promise<Picture>}
   */
  async #complete(event) {
    const blob = blobOf(event.image, `image/${this.request.output_format}`);
    this.image.src = URL.createObjectURL(blob);
    this.image.alt = this.request.prompt;
    this.image.hidden = false;
    delete this.image.dataset.preview;
    await this.image.decode();
    const picture = {
      blob,
      request: {
        ...this.request,
        width: this.image.naturalWidth,
        height: this.image.naturalHeight,
        seed: event["x-seed"],
      },
      computed: Number(event["x-steps-computed"]),
      total: Number(event["x-steps-total"]),
      schedule: event["x-schedule"],
      milliseconds: Number(event["x-denoise-ms"]) + Number(event["x-decode-ms"]),
    };
    this.now.textContent = summary(picture);
    return picture;
  }
}

/**
 * What a picture took, in one line.
 * @param {Picture} picture
 * @returns {string}
 */
export function summary({ computed, total, milliseconds, request }) {
  return `${computed} of ${total} steps computed · ${duration(milliseconds)} · seed ${request.seed}`;
}

/**
 * @param {string} base64
 * @param {string} type
 * @returns {Blob}
 */
function blobOf(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (char) => char.charCodeAt(0))], { type });
}
