"""``python -m twoclocks``: the same as the command ``twoclocks``."""

import sys

from twoclocks.cli import main

if __name__ == "__main__":
    sys.exit(main())
