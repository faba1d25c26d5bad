"""The commands beside running an experiment: generate text, compile ahead of time, benchmark, export."""
