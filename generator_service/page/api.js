/** @file The client of the generator's API: JSON, server-sent events and the API key. */

import { askForKey, rememberedKey } from "./key.js";

/**
 * The body of `POST /generate`; `seed` in decimal digits.
 * @typedef {object} GenerateRequest
 * @property {string} prompt
 * @property {number} [width]
 * @property {number} [height]
 * @property {number} [num_inference_steps]
 * @property {number} [guidance_scale]
 * @property {string} [seed]
 * @property {string | number} [cache]
 * @property {string} output_format
 * @property {string[]} images
 * @property {number} [previews]
 */

/**
 * A cache mode of `GET /modes`.
 * @typedef {object} Mode
 * @property {string | number} name
 * @property {number} computed
 * @property {number} total
 * @property {number[]} computed_steps
 * @property {string} schedule
 * @property {number | null} estimate_ms
 */

/**
 * The response of `GET /modes`.
 * @typedef {object} Modes
 * @property {string} model
 * @property {{width: number, height: number, num_inference_steps: number, guidance_scale: number,
 *             cache: string | number}} default
 * @property {Mode[]} modes
 */

/** @typedef {{name: string, data: any}} ServiceEvent */

const UNAUTHORIZED = 401;

/** An error response of the service; `param` names the invalid field, if there is one. */
export class ServiceError extends Error {
  /**
   * @param {string} message
   * @param {string | null} [param]
   */
  constructor(message, param = null) {
    super(message);
    this.param = param;
  }

  /**
   * @param {any} problem a body of `application/problem+json`
   * @returns {ServiceError}
   */
  static of(problem) {
    return new ServiceError(problem.detail, problem.error?.param ?? null);
  }
}

/**
 * Read the modes and their estimates for some parameters. The service has defaults for empty values.
 * @param {Record<string, string>} parameters
 * @param {string[]} sizes of the reference images, as WIDTHxHEIGHT
 * @param {AbortSignal} signal
 * @returns {Promise<Modes>}
 */
export async function readModes(parameters, sizes, signal) {
  const given = Object.entries(parameters).filter(([, value]) => value !== "");
  for (const size of sizes) given.push(["images", size]);
  const response = await request(`modes?${new URLSearchParams(given)}`, { signal });
  return response.json();
}

/**
 * Generate an image; aborting `signal` cancels the request at the service.
 * @param {GenerateRequest} body
 * @param {AbortSignal} signal
 * @yields {ServiceEvent}
 * @returns {AsyncGenerator<ServiceEvent>}
 */
export async function* generate(body, signal) {
  const headers = { "Accept": "text/event-stream", "Content-Type": "application/json" };
  const response = await request("generate", { method: "POST", headers, body: toJson(body), signal });
  for await (const event of readEvents(response)) {
    if (event.name === "error") throw ServiceError.of(event.data);
    yield event;
  }
}

/**
 * Serialize a request. Seeds go up to 2^63 - 1, more than a number can hold, so their digits are inserted as text.
 * @param {GenerateRequest} body
 * @returns {string}
 */
function toJson({ seed, ...rest }) {
  if (seed === undefined) return JSON.stringify(rest);
  const isInteger = /^-?\d+$/.test(seed);
  return `${JSON.stringify(rest).slice(0, -1)},"seed":${isInteger ? BigInt(seed) : JSON.stringify(seed)}}`;
}

/**
 * Fetch with the stored API key; ask for one as long as the service responds with 401.
 * @param {string} path relative to the page, so that a proxy may serve it below any path
 * @param {RequestInit} options
 * @returns {Promise<Response>}
 */
async function request(path, options) {
  for (;;) {
    const key = rememberedKey();
    const response = await reach(path, withKey(options, key));
    if (response.ok) return response;
    const error = await problemOf(response);
    if (response.status !== UNAUTHORIZED || !(await askForKey(key))) throw error;
  }
}

/**
 * @param {RequestInit} options
 * @param {string | null} key
 * @returns {RequestInit}
 */
function withKey(options, key) {
  return key === null ? options : { ...options, headers: { ...options.headers, Authorization: `Bearer ${key}` } };
}

/**
 * @param {string} path
 * @param {RequestInit} options
 * @returns {Promise<Response>}
 */
async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServiceError("The service cannot be reached.");
  }
}

/**
 * @param {Response} response
 * @returns {Promise<ServiceError>}
 */
async function problemOf(response) {
  try {
    return ServiceError.of(await response.json());
  } catch {
    return new ServiceError(`The service responded with status ${response.status}.`); // probably a proxy's page
  }
}

/**
 * Read server-sent events. (`EventSource` supports only GET.)
 * @param {Response} response
 * @yields {ServiceEvent}
 * @returns {AsyncGenerator<ServiceEvent>}
 */
async function* readEvents(response) {
  if (response.body === null) return;
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const blocks = (rest + decoder.decode(value, { stream: true })).split(/\r\n\r\n|\n\n/);
    rest = blocks.pop() ?? "";
    for (const block of blocks) {
      const event = parseEvent(block);
      if (event !== null) yield event;
    }
  }
}

/**
 * @param {string} block
 * @returns {ServiceEvent | null} null for a comment, which keeps the connection alive
 */
function parseEvent(block) {
  const name = /^event: (.*)$/m.exec(block)?.[1];
  const data = /^data: (.*)$/m.exec(block)?.[1];
  return name && data ? { name: name.trim(), data: JSON.parse(data) } : null;
}
