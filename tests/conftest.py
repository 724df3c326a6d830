"""Fixtures of several test files; the servers themselves stand in fake_server.py and real_servers.py."""
