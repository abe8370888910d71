"""``python -m prefopt``, and with it ``accelerate launch -m prefopt``."""

from __future__ import annotations

import sys

from prefopt.cli import main

sys.exit(main())
