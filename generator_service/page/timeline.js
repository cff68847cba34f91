/** @file The steps of a run as a row of bars: tall and solid where computed, low and hollow where reused. */

/** A row of steps that fills up. */
export class Timeline {
  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
  }

  /**
   * The steps that are to come.
   * @param {number} total
   */
  begin(total) {
    this.root.replaceChildren(...Array.from({ length: total }, () => document.createElement("i")));
    this.root.ariaValueMin = "0";
    this.root.ariaValueMax = String(total);
  }

  /**
   * A step begins.
   * @param {number} step from 0
   * @param {boolean} isComputed
   */
  mark(step, isComputed) {
    this.root.children[step].className = isComputed ? "computed" : "reused";
    this.root.ariaValueNow = String(step + 1);
    this.root.ariaValueText = `step ${step + 1} of ${this.root.children.length}`;
  }

  /**
   * A whole run at once.
   * @param {number} total
   * @param {number[]} computedSteps
   */
  show(total, computedSteps) {
    this.begin(total);
    for (let step = 0; step < total; step++) this.mark(step, computedSteps.includes(step));
  }
}
