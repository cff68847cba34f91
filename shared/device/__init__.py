"""The device of a service, and the one thread that uses it."""
