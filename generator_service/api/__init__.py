"""The generator's routes and the bodies they take."""
