"""The APIs of others, which their clients speak unchanged."""
