"""Fixtures of several test files; the servers themselves stand in fake_server.py and real_servers.py."""

import hypothesis
from real_servers import exporting_vllm, one_at_a_time, otlp_port, real_transformers, real_vllm

__all__ = ["exporting_vllm", "one_at_a_time", "otlp_port", "real_transformers", "real_vllm"]

# how long an example takes says something of the machine, nothing of the code
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")
