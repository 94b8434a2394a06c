"""The folder of the scripts is on the path, as Python puts it there for a script that it runs."""

import sys

from tests.research_code.scripts import SCRIPTS

sys.path.insert(0, str(SCRIPTS))
