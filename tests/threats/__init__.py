"""What the services do when something goes wrong, repeated often enough to be convincing.

``make test`` runs the quick form of each test, ``make soak`` the long one.
"""
