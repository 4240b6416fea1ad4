"""`python -m imgfs` is the `imgfs` command."""

import sys

from imgfs.cli import main

sys.exit(main())
