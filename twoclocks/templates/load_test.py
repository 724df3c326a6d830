"""The locustfile: ``locust -f load_test.py --experiment configs/demo-vllm.yaml``.

Everything is in the package; this file only names the user class for Locust to find, and listens.
"""

from twoclocks import hooks
from twoclocks.user import StreamingUser

hooks.listen()

__all__ = ["StreamingUser"]
