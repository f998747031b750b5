"""Which recipe suits a model, an accuracy and a machine: candidates, measured here."""

from tcompress.advisor.advice import Advice, Measured
from tcompress.advisor.advise import advise
from tcompress.advisor.candidates import Candidate
from tcompress.advisor.target import Target

__all__ = ["Advice", "Candidate", "Measured", "Target", "advise"]
