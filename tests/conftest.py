"""Eight simulated devices for tests of sharding; a computation that names none still runs on one."""

import os

import fast_compilation

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {fast_compilation.flags(devices=8)}".strip()
pytest_plugins = ("object_store",)
