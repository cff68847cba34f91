"""The engine: admits requests, queues their images, runs them on the device, and encodes the results."""
