"""What long work leaves in its work directory: checkpoints and metrics."""
