"""What guessing takes per row and node, in C++: rows, sources, judge, tree, planner, partition.

A step of some hundred rows asks for thousands of small decisions, which must not take longer than the step itself.
The module is compiled on the first import (runtime.compiler); its contents are described in __init__.pyi.
"""

import sys
from pathlib import Path

from runtime.compiler import extension_module

sys.modules[__name__] = extension_module("lookahead", __name__, Path(__file__).with_name("core.cpp"))
