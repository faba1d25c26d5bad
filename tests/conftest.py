"""Eight simulated devices for tests of sharding; a computation that names none still runs on one.

Programs are compiled in a hurry: nearly all the time of these tests is the compiler's.
"""

import os

FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
