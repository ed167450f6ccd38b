"""`python -m launch.local`: the same as `python launch/local/run.py`."""

import sys

from launch.local.run import main

if __name__ == "__main__":
    sys.exit(main())
