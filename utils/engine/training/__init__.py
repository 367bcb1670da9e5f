"""Training: the one loop, what it is told, how it continues, and where its numbers go."""
