"""Enters init in a container: `python3 -I -m ringfence.runner.init`."""

import sys

from ringfence.runner.init.main import main

if __name__ == "__main__":
    sys.exit(main())
