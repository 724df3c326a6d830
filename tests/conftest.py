"""Fixtures of several test files; the servers themselves stand in fake_server.py and real_servers.py."""

import functools
import signal
from pathlib import Path

import hypothesis
import pytest
from real_servers import exporting_vllm, one_at_a_time, otlp_port, real_transformers, real_vllm
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

__all__ = ["exporting_vllm", "one_at_a_time", "otlp_port", "real_transformers", "real_vllm"]

# a shell's background job ignores these, and so would all that the tests start and then stop
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)

# how long an example takes says something of the machine, nothing of the code
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


class ByServers(LoadScopeScheduling):
    """A file stays in one process, and all files that start real servers in the same one, so that two never compete."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "real servers" if "mark.real" in _text(file) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ByServers:
    """How -n 2 deals out the tests. xdist's own groups (--dist loadgroup) are not seen with this pytest."""
    return ByServers(config, log)


@functools.cache
def _text(file: str) -> str:
    return (Path(__file__).parent.parent / file).read_text(encoding="utf-8")
