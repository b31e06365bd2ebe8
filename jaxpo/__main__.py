"""`python -m jaxpo`, the same as `jaxpo`."""

import sys

from jaxpo.cli import main

sys.exit(main())
