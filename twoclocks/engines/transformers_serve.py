"""The command `transformers`, which with continuous batching then logs the queue time and the end of each request.

Run by the environment that transformers is installed in, also as the container of deploy/transformers.Dockerfile. The
line is its only timing, a debug message on a logger that --log-level does not reach in 5.23.
"""

import logging

from transformers.cli.transformers import main

logging.getLogger("ContinuousBatchingLogger").setLevel(logging.DEBUG)

if __name__ == "__main__":
    main()
