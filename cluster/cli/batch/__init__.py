"""`outrider batch`: JSON lines in, JSON lines out, in the same order, whatever some of them are.

`records` reads lines and says what each asks for; `output` is where answers go, and what keeps them; `job` asks for
them; `progress` is what people see meanwhile.
"""

from cluster.cli.batch.job import StoppedError, Totals, answer, run
from cluster.cli.batch.output import ClosedError, is_standard_output
from cluster.cli.batch.records import Record, parse, read_lines

__all__ = [
    "ClosedError",
    "Record",
    "StoppedError",
    "Totals",
    "answer",
    "is_standard_output",
    "parse",
    "read_lines",
    "run",
]
