"""What both services must say or do identically. Imports neither of them."""
