/** @file The timeline of a run's steps: tall solid bars for computed steps, low hollow ones for reused steps. */

/** A row of bars that fills up. */
export class Timeline {
  /** @param {HTMLElement} root */
  constructor(root) {
    this.root = root;
  }

  /**
   * Show a run whose steps are all to come.
   * @param {number} total
   */
  begin(total) {
    this.root.replaceChildren(...Array.from({ length: total }, () => document.createElement("i")));
    this.root.ariaValueMin = "0";
    this.root.ariaValueMax = String(total);
  }

  /**
   * Show that a step has started.
   * @param {number} step from 0
   * @param {boolean} isComputed
   */
  mark(step, isComputed) {
    this.root.children[step].className = isComputed ? "computed" : "reused";
    this.root.ariaValueNow = String(step + 1);
    this.root.ariaValueText = `step ${step + 1} of ${this.root.children.length}`;
  }

  /**
   * Show a complete run.
   * @param {number} total
   * @param {number[]} computedSteps
   */
  show(total, computedSteps) {
    this.begin(total);
    for (let step = 0; step < total; step++) this.mark(step, computedSteps.includes(step));
  }
}
