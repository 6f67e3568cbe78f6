"""`outrider batch`: JSON lines in, JSON lines out, in the same order, whatever some of them are.

`records` reads lines and says what each asks for; `job` asks for the answers; `results` are the lines that they become;
`output` is where those go, and `earlier` what is there; `progress` is what people see meanwhile.
"""

from cluster.cli.batch.job import StoppedError, away_patience_s, run
from cluster.cli.batch.output import ClosedError, is_standard_output
from cluster.cli.batch.records import Record, parse, read_lines
from cluster.cli.batch.results import Totals, answer

__all__ = [
    "ClosedError",
    "Record",
    "StoppedError",
    "Totals",
    "answer",
    "away_patience_s",
    "is_standard_output",
    "parse",
    "read_lines",
    "run",
]
