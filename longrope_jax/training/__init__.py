"""Training: one step as a pure function, and the loop around it."""
