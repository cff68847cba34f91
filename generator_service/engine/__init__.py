"""From a resolved request to finished files: admission, the queue before the device, and the device's worker."""
