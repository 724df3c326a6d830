"""Fixtures of several test files; the servers themselves stand in fake_server.py and real_servers.py."""

import hypothesis
import pytest
from real_servers import exporting_vllm, one_at_a_time, otlp_port, real_transformers, real_vllm

__all__ = ["exporting_vllm", "one_at_a_time", "otlp_port", "real_transformers", "real_vllm"]

# how long an example takes says something of the machine, nothing of the code
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.hookimpl(tryfirst=True)  # else xdist has looked for the groups before they are there
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes (-n 2 --dist loadgroup) a file stays in one, and one has all that use the real servers."""
    for item in items:
        real = item.get_closest_marker("real")
        item.add_marker(pytest.mark.xdist_group("real servers" if real else item.nodeid.partition("::")[0]))
