"""`python -m duollm`: the command line for `torchrun -m` and for a Python that has no scripts on its path."""

import sys

from duollm.cli import main

sys.exit(main())
