/** @file Finds elements of the page; a missing element or one of another type is an error. */

/**
 * Find the element of a selector.
 * @template {Element} T
 * @param {string} selector
 * @param {new () => T} type
 * @param {ParentNode} [root]
 * @returns {T}
 */
export function one(selector, type, root = document) {
  const element = root.querySelector(selector);
  if (!(element instanceof type)) throw new TypeError(`the page has no ${type.name} ${selector}`);
  return element;
}

/**
 * Copy the content of a template.
 * @template {Element} T
 * @param {string} template a selector
 * @param {new () => T} type of the one element in it
 * @returns {T}
 */
export function copyOf(template, type) {
  return one("*", type, document.importNode(one(template, HTMLTemplateElement).content, true));
}

/**
 * Set the text of an element.
 * @param {string} selector
 * @param {string} text
 * @param {ParentNode} [root]
 */
export function write(selector, text, root = document) {
  one(selector, HTMLElement, root).textContent = text;
}
