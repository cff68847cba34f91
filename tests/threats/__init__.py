"""What the services do when something goes wrong, as often as it takes to believe it.

``make test`` runs the quick form of each, ``make soak`` the long one.
"""
