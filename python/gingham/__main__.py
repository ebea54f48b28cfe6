"""python -m gingham"""

import sys

from .commands.cli import main

sys.exit(main())
