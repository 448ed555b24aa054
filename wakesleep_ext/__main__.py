"""Run the command line as a module: `python -m wakesleep_ext`, or `torchrun … -m wakesleep_ext`."""

import sys

from _wakesleep_command import main

if __name__ == "__main__":
    sys.exit(main())
