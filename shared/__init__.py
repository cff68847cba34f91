"""What both services must say or do identically.

The package is imported as ``flux2_shared``, through the link of that name beside this folder: installed packages must
not have a name that a folder of another project may have, too.
"""

if __name__ == "shared":
    raise ImportError("import flux2_shared instead: the same modules under two names would not be equal")
