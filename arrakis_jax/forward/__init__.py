"""Running a model: the compiled forward, what tools read, and targets."""
