"""Plans that may be best, and the race that decides which of them recovers best."""

from .candidates import GENERATORS, GIVEN, Candidate, Generator, field_of, searched
from .fits import Fits, fits_of, no_larger
from .judge import Judge
from .preparations import PREPARATIONS
from .race import Race, entrants_of, run_race
from .record import Entrant, RaceRecord, Run

__all__ = [
    "GENERATORS",
    "GIVEN",
    "PREPARATIONS",
    "Candidate",
    "Entrant",
    "Fits",
    "Generator",
    "Judge",
    "Race",
    "RaceRecord",
    "Run",
    "entrants_of",
    "field_of",
    "fits_of",
    "no_larger",
    "run_race",
    "searched",
]
