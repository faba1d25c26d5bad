"""How good a model is with given factors, and how sure we are of it."""
