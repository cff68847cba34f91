/** @file Formats numbers. */

/**
 * Format a duration.
 * @param {number} milliseconds
 * @returns {string}
 */
export function duration(milliseconds) {
  const seconds = milliseconds / 1000;
  if (seconds < 9.95) return `${seconds.toFixed(seconds < 0.995 ? 2 : 1)} s`;
  if (seconds < 99.5) return `${Math.round(seconds)} s`;
  return `${Math.floor(Math.round(seconds) / 60)} min ${Math.round(seconds) % 60} s`;
}

/**
 * Format the similarity of two images.
 * @param {number} decibels
 * @returns {string}
 */
export function similarity(decibels) {
  return decibels === Infinity ? "identical" : `PSNR ${decibels.toFixed(1)} dB`;
}
