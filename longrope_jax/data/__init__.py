"""Text -> documents -> windows of tokens."""
