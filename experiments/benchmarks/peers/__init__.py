"""Other frameworks, each in an environment of its own, on the same data and models."""
