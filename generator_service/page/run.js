/** @file One picture on its way: its steps, its previews, the time left, and at last the picture. */

import { generate } from "./api.js";
import { copyOf, one, write } from "./dom.js";
import { Timeline } from "./timeline.js";
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

/** A panel for one picture. */
export class Run {
  /**
   * @param {GenerateRequest} request
   * @param {string} title
   */
  constructor(request, title) {
    this.request = request;
    this.element = copyOf("#run-template", HTMLElement);
    this.image = one("img", HTMLImageElement, this.element);
    this.now = one(".now", HTMLElement, this.element);
    this.timeline = new Timeline(one(".timeline", HTMLElement, this.element));
    write("h3", title, this.element);
    this.now.textContent = "Waiting for its turn";
    this.isNext = false;
  }

  /**
   * Have it drawn.
   * @param {AbortSignal} signal
   * @returns {Promise<Picture>}
   */
  async draw(signal) {
    for await (const { name, data } of generate(this.request, signal)) {
      if (name === "queued") this.#showPlace(data);
      else if (name === "encoding") this.#showReading();
      else if (name === "step") this.#showStep(data);
      else if (name === "preview") this.#showPreview(data);
      else if (name === "completed") return this.#complete(data);
    }
    throw new Error("The service ended the connection before the picture was there.");
  }

  /** @param {string} text why there is no picture */
  end(text) {
    this.now.textContent = text;
  }

  /** @param {{position: number, wait_ms?: number}} event */
  #showPlace({ position, wait_ms: wait }) {
    this.isNext = position === 0;
    const before = this.isNext ? "" : `: ${position} before this one`;
    const eta = this.isNext || wait === undefined ? "" : ` · ${duration(wait)}`;
    this.now.textContent = `Waiting for its turn${before}${eta}`;
  }

  #showReading() {
    if (this.isNext) this.now.textContent = "Reading the prompt"; // else the line is what it waits for
  }

  /** @param {{step: number, total: number, computed: boolean, eta_ms?: number}} event */
  #showStep({ step, total, computed, eta_ms: left }) {
    if (step === 0) this.timeline.begin(total);
    this.timeline.mark(step, computed);
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
