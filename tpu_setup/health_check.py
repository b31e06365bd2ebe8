"""Checks that the devices of all hosts work together. To be started on every host: `jaxpo.health` says what it does."""

import sys

from jaxpo import health

if __name__ == '__main__':
    sys.exit(health.main())
