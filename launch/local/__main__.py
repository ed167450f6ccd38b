"""Several processes on this machine: `run` says more."""

import sys

from launch.local.run import main

if __name__ == "__main__":
    sys.exit(main())
