"""What guessing takes per row and node, in C++: rows, sources, judge, tree, planner, partition.

A step of some hundred rows asks for thousands of small decisions, which must not take longer than the step itself.
The module is compiled on the first import (runtime.lookahead.build); its contents are described in __init__.pyi.
"""

import sys

from runtime.lookahead import build

sys.modules[__name__] = build.load(__name__)
