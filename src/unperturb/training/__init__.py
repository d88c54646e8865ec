"""Training: one loop, what it feeds on, what it minimizes, and whole jobs."""
