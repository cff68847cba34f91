"""What makes a loaded model fast, and how profiles choose from it."""
