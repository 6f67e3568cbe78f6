"""What a step takes per row, node and token, in C++: rows and their division, candidate trees and what proposes and
judges them, and what a cache keeps.

A step of some hundred rows asks for thousands of small decisions, which must not take longer than the step itself.
The module is compiled on the first import (runtime.build); its contents are described in __init__.pyi.
"""

import sys

from runtime import build

sys.modules[__name__] = build.load(__name__)
