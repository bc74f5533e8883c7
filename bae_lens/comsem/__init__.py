"""ComSem: do the features of a dictionary mean something? (section 4.2 and appendix B of the paper)

`ComSem(judge).score(model, sae, dataset)` takes any SAELens dictionary. `collect` finds the tokens that activate its
features and tokens that do not, `judges` explain and judge them, `scorer` asks about one feature after another, for
ComSem's own score and those of `scores`, `results` and `exports` hold what came out, and `agreement` says how scores
agree. The names below are imported when they are asked for, so that only a judge on a server needs openai, and only the
offline judge its models.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bae_lens.comsem.collect.corpus import CorpusSettings
    from bae_lens.comsem.judges.answer_cache import AnswerCache
    from bae_lens.comsem.judges.client import ChatClient
    from bae_lens.comsem.judges.judge import Judge
    from bae_lens.comsem.judges.language_model import LanguageModelJudge
    from bae_lens.comsem.judges.offline import OfflineJudge
    from bae_lens.comsem.judges.spending import Budget, Price
    from bae_lens.comsem.results import ComSemReport
    from bae_lens.comsem.score import ComSem

__all__ = [
    "AnswerCache",
    "Budget",
    "ChatClient",
    "ComSem",
    "ComSemReport",
    "CorpusSettings",
    "Judge",
    "LanguageModelJudge",
    "OfflineJudge",
    "Price",
]
MODULES = {
    "AnswerCache": "judges.answer_cache",
    "Budget": "judges.spending",
    "ChatClient": "judges.client",
    "ComSem": "score",
    "ComSemReport": "results",
    "CorpusSettings": "collect.corpus",
    "OfflineJudge": "judges.offline",
    "Judge": "judges.judge",
    "LanguageModelJudge": "judges.language_model",
    "Price": "judges.spending",
}


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULES[name]}"), name)
