"""`python -m shard_tools` is the same as `shard_tools`."""

import sys

from shard_tools.cli import main

if __name__ == "__main__":  # worker processes import this file again
    sys.exit(main())
