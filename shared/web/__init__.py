"""The skeleton of both apps and the server that runs them."""
