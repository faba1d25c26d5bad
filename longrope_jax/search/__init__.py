"""The evolutionary search for rescale factors (LongRoPE sec. 3.2, Algorithm 1)."""
