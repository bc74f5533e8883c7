"""ComSem: do the features of a dictionary mean something? (section 4.2 and appendix B of the paper)"""

from bae_lens.comsem.results import ComSemReport
from bae_lens.comsem.score import ComSem

__all__ = ["ComSem", "ComSemReport"]
