"""Several finished work directories side by side."""

from longrope_jax.comparison.report import write_comparison

__all__ = ["write_comparison"]
