"""Fields of records that tell how fast something was: all that two runs of the same may differ in."""

SPEEDS = {"tokens_per_second", "tokens_per_second_per_device", "step_seconds", "seconds"}
