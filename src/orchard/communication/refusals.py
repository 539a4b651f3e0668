"""Why a site does not answer a request: a code, and the option that it is about.

Nothing else crosses the network. What was wrong with which row of which file is the site's own:
its log and its audit have the whole message, and whoever asked has a sentence from the table here.
"""

from __future__ import annotations

from enum import StrEnum

from orchard.communication.readable import readable


class Code(StrEnum):
    """What a site may say; the sentences are in ``explain``."""

    REQUEST = "request"
    METHOD = "method"
    METHOD_SOURCE = "method_source"
    MODEL = "model"
    DEVICE = "device"
    BUDGET = "budget"
    MEMORY = "memory"
    LIMIT = "limit"
    OWN_FILE = "own_file"
    TERMS = "terms"
    TASK_KIND = "task_kind"
    DATA = "data"
    DATA_CHANGED = "data_changed"
    DATA_TRIES = "data_tries"
    FEW_ROWS = "few_rows"
    RECIPE = "recipe"
    RECIPE_CHANGED = "recipe_changed"
    NOT_JOINED = "not_joined"
    RUNS = "runs"
    RATE = "rate"
    SITE = "site"
    ROUND = "round"
    SETTINGS = "settings"
    EVALUATION = "evaluation"
    REPEATED = "repeated"
    BASE_CHANGED = "base_changed"
    STATE = "state"
    SECRECY = "secrecy"
    PRIVACY = "privacy"
    NOT_TRAINED = "not_trained"
    LEFT_SUM = "left_sum"
    BEYOND_BOUND = "beyond_bound"
    LOOKING = "looking"
    DIVERGED = "diverged"
    NO_MEMORY = "no_memory"
    NO_SPACE = "no_space"
    NO_WORKER = "no_worker"
    FAILED = "failed"


_SENTENCES = {
    Code.REQUEST: "the request is none of Orchard's; run the same version on both sides",
    Code.METHOD: "the owner does not take part in this method; choose another, or ask for it",
    Code.METHOD_SOURCE: "the site has another source of an own method; install the same version",
    Code.MODEL: "the site does not have this base model; its owner names one with --model",
    Code.DEVICE: "the site has no such device",
    Code.BUDGET: "the owner's --budget is not kept by this; choose a method that fits a budget",
    Code.MEMORY: "predicted to take more memory than the site's owner gives, or its machine has; "
    "lower its sizes",
    Code.LIMIT: "above the owner's limit; lower it, or ask for more",
    Code.OWN_FILE: "the owner has named no file of the site's own for this",
    Code.TERMS: "not as the owner of the data has agreed; the data section is the site's own",
    Code.TASK_KIND: "the site's data is for another kind of task",
    Code.DATA: "the site's data cannot be read so; its owner finds the reason in the site's log",
    Code.DATA_CHANGED: "the site's data is not what it began the run with; its owner brings it "
    "back, or takes part in another run",
    Code.DATA_TRIES: "too many tries to read the site's data; its owner has to look at them",
    Code.FEW_ROWS: "fewer rows than the owner wants to be measured or counted together",
    Code.RECIPE: "the recipe does not work at this site; its owner finds the reason in the log",
    Code.RECIPE_CHANGED: "not the recipe that the site has joined this run with",
    Code.NOT_JOINED: "the site has not joined this run; start the coordinator again with --resume",
    Code.RUNS: "the site has joined as many new runs today as its owner allows",
    Code.RATE: "asked more often in an hour than its owner allows; ask again later",
    Code.SITE: "the request is for another site",
    Code.ROUND: "not a round of the recipe that the site has joined with",
    Code.SETTINGS: "the task trains otherwise than the recipe that the site has joined with",
    Code.EVALUATION: "not what the recipe that the site has joined with measures",
    Code.REPEATED: "more global trees in one round than the owner allows",
    Code.BASE_CHANGED: "the site's base model is not the one it began the run with",
    Code.STATE: "a personal file is damaged and was set aside; asked again, the site goes on from "
    "the last good one, or says that it has none",
    Code.SECRECY: "a sum that could show the site's own update, or show it to those its owner does "
    "not know; its owner finds the rule in the site's log",
    Code.PRIVACY: "more of the site's rows would leave than its owner's --epsilon allows; the "
    "count is in the site's log",
    Code.NOT_TRAINED: "the site has no update of this round at hand, as after a restart; it is "
    "asked to train again",
    Code.LEFT_SUM: "the site has left this sum, as after a restart; the next one is begun with new "
    "masks",
    Code.BEYOND_BOUND: "a value or weight of the site's update is beyond what was agreed on; raise "
    "the bound, or lower client.lr",
    Code.LOOKING: "the owner looks at what is asked, and has not joined yet",
    Code.DIVERGED: "the loss or an update was not finite; lower client.lr",
    Code.NO_MEMORY: "the site ran out of memory",
    Code.NO_SPACE: "the site's disk is full",
    Code.NO_WORKER: "the site's worker does not answer",
    Code.FAILED: "something failed at the site; its owner finds it in the site's log",
}


def known_code(text: str) -> Code | None:
    """Return the code that a text is; None where it is none."""
    try:
        return Code(text)
    except ValueError:
        return None


def explain(text: str, option: str = "") -> str:
    """Return what a site's answer means, as a sentence of this side's own.

    Args:
        text: The code as it arrived; what is none is shown as it is, cut and escaped.
        option: Of the recipe or of the site's command; empty = none.
    """
    code = known_code(text)
    sentence = f"{_SENTENCES[code]} ({code})" if code else readable(text)
    return f"{option}: {sentence}" if option else sentence
