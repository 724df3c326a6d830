"""Fixtures of several test files; the servers themselves stand in fake_server.py and real_servers.py."""

from real_servers import real_transformers, real_vllm

__all__ = ["real_transformers", "real_vllm"]
