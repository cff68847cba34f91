"""One-line changes of the product, each of which the tests must detect; ``make mutants`` applies them one at a time."""
