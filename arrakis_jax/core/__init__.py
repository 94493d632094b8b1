"""What everything stands on: shape letters, errors, numerics, the config and the checks."""
