/** @file Compares two images of one seed: one over the other with a slider, and their PSNR. */

import { copyOf, one, write } from "./dom.js";
import { duration, similarity } from "./text.js";

/** @typedef {import("./run.js").Result} Result */

/**
 * Show two images of the same size over each other.
 * @param {Result} left
 * @param {Result} right
 * @returns {Promise<HTMLElement>}
 */
export async function comparison(left, right) {
  const figure = copyOf("#comparison-template", HTMLElement);
  const pair = one(".pair", HTMLElement, figure);
  const slider = one("input", HTMLInputElement, figure);
  for (const [side, result] of Object.entries({ left, right })) {
    const image = one(`img.${side}`, HTMLImageElement, figure);
    image.src = URL.createObjectURL(result.blob);
    image.alt = `${result.request.cache}: ${result.request.prompt}`;
    write(`.${side}-tag`, String(result.request.cache), figure);
  }
  slider.addEventListener("input", () => split(pair, slider, left, right));
  split(pair, slider, left, right);
  write("figcaption", await caption(left, right), figure);
  return figure;
}

/**
 * Show the left image up to the slider's position.
 * @param {HTMLElement} pair
 * @param {HTMLInputElement} slider
 * @param {Result} left
 * @param {Result} right
 */
function split(pair, slider, left, right) {
  pair.style.setProperty("--split", `${slider.value}%`);
  slider.ariaLabel = `Border between ${left.request.cache} on the left and ${right.request.cache} on the right`;
  slider.ariaValueText = `${slider.value} % ${left.request.cache}`;
}

/**
 * @param {Result} left
 * @param {Result} right
 * @returns {Promise<string>}
 */
async function caption(left, right) {
  const details = [left, right].map(
    ({ request, computed, total, milliseconds }) =>
      `${request.cache}: ${computed} of ${total} steps, ${duration(milliseconds)}`,
  );
  return [similarity(await psnr(left.blob, right.blob)), ...details].join(" · ");
}

/**
 * Peak signal-to-noise ratio of two images of the same size, in decibels; infinite if their pixels are equal.
 * @param {Blob} left
 * @param {Blob} right
 * @returns {Promise<number>}
 */
export async function psnr(left, right) {
  const [a, b] = await Promise.all([pixels(left), pixels(right)]);
  let sum = 0;
  for (let k = 0; k < a.length; k++) sum += (a[k] - b[k]) ** 2; // images are opaque: alpha adds nothing
  const meanSquare = sum / (a.length * (3 / 4));
  return 10 * Math.log10(255 ** 2 / meanSquare);
}

/**
 * @param {Blob} blob
 * @returns {Promise<Uint8ClampedArray>} red, green, blue and alpha of each pixel
 */
async function pixels(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  if (context === null) throw new Error("This browser cannot compare images.");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}
