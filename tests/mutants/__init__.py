"""One-line changes of the product, each of which the tests must notice; ``make mutants`` applies them one at a time."""
