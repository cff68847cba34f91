"""APIs that are compatible with clients of other services."""
