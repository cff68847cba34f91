/** @file Finds the elements of the page: what is missing or of another kind is an error at once. */

/**
 * The element that `selector` names.
 * @template {Element} T
 * @param {string} selector
 * @param {new () => T} type
 * @param {ParentNode} [root]
 * @returns {T}
 */
export function one(selector, type, root = document) {
  const found = root.querySelector(selector);
  if (!(found instanceof type)) throw new TypeError(`the page has no ${type.name} ${selector}`);
  return found;
}

/**
 * A copy of what a template holds.
 * @template {Element} T
 * @param {string} template a selector
 * @param {new () => T} type of the one element in it
 * @returns {T}
 */
export function copyOf(template, type) {
  return one("*", type, document.importNode(one(template, HTMLTemplateElement).content, true));
}

/**
 * Write a text.
 * @param {string} selector
 * @param {string} text
 * @param {ParentNode} [root]
 */
export function write(selector, text, root = document) {
  one(selector, HTMLElement, root).textContent = text;
}
