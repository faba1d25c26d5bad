"""A run's records -> report.json, report.md with figures, and report.html: all that the paper's readers ask for."""

from longrope_jax.report.document import summarize, summary_tables, write_report

__all__ = ["summarize", "summary_tables", "write_report"]
