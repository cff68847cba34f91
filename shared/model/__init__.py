"""What both services do with a model: find, load, check and compile it."""
