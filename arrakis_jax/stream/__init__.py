"""The residual stream as a value: its fields, padding, points, captures and edits."""
