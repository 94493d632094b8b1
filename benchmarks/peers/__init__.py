"""The peers' side of a comparison, in a virtual environment of its own (`setup.sh` makes it)."""
