/** @file The panel of one request: its queue position, steps, previews, remaining time and final image. */

import { generate } from "./api.js";
import { copyOf, one, write } from "./dom.js";
import { duration } from "./text.js";
import { Timeline } from "./timeline.js";

/** @typedef {import("./api.js").GenerateRequest} GenerateRequest */

/**
 * A generated image and its request.
 * @typedef {object} Result
 * @property {Blob} blob
 * @property {GenerateRequest} request complete: sending it again gives the same image
 * @property {number} computed
 * @property {number} total
 * @property {string} schedule
 * @property {number} milliseconds denoising and decoding
 * @property {boolean} [isTruncated] whether the end of the prompt was ignored
 */

/** The panel of one request. */
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
    this.now.textContent = "Waiting in the queue";
    this.isNext = false;
  }

  /**
   * Send the request and show its progress.
   * @param {AbortSignal} signal
   * @returns {Promise<Result>}
   */
  async start(signal) {
    for await (const { name, data } of generate(this.request, signal)) {
      if (name === "queued") this.#showPosition(data);
      else if (name === "encoding") this.#showEncoding();
      else if (name === "step") this.#showStep(data);
      else if (name === "preview") this.#showPreview(data);
      else if (name === "completed") return this.#complete(data);
    }
    throw new Error("The service closed the connection before the image was complete.");
  }

  /** @param {string} text why there is no image */
  end(text) {
    this.now.textContent = text;
  }

  /** @param {{position: number, wait_ms?: number}} event */
  #showPosition({ position, wait_ms: wait }) {
    this.isNext = position === 0;
    const ahead = this.isNext ? "" : `: ${position} ahead`;
    const eta = this.isNext || wait === undefined ? "" : ` · ${duration(wait)}`;
    this.now.textContent = `Waiting in the queue${ahead}${eta}`;
  }

  #showEncoding() {
    if (this.isNext) this.now.textContent = "Encoding the prompt"; // else it waits for other requests
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
   * @returns {Promise<Result>}
   */
  async #complete(event) {
    const blob = blobOf(event.image, `image/${this.request.output_format}`);
    this.image.src = URL.createObjectURL(blob);
    this.image.alt = this.request.prompt;
    this.image.hidden = false;
    delete this.image.dataset.preview;
    await this.image.decode();
    const result = {
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
      isTruncated: event["x-prompt-truncated"] === "true",
    };
    this.now.textContent = summary(result);
    return result;
  }
}

/**
 * Summarize a result in one line.
 * @param {Result} result
 * @returns {string}
 */
export function summary({ computed, total, milliseconds, isTruncated, request }) {
  const warning = isTruncated ? " · the end of the prompt was ignored: it is too long" : "";
  return `${computed} of ${total} steps computed · ${duration(milliseconds)} · seed ${request.seed}${warning}`;
}

/**
 * @param {string} base64
 * @param {string} type
 * @returns {Blob}
 */
function blobOf(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (char) => char.charCodeAt(0))], { type });
}
