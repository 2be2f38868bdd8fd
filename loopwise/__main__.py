"""`python -m loopwise`."""

import sys

from .cli import main

sys.exit(main())
