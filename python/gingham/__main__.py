"""python -m gingham"""

import sys

from .cli import main

sys.exit(main())
