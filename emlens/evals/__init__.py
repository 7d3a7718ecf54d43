"""Evaluation: questions, responses, judges, and the rates that follow from them."""

from emlens.evals.agreement import Agreement, agreement
from emlens.evals.local_judge import LocalJudge
from emlens.evals.probe_judge import ProbeJudge, Trust
from emlens.evals.questions import Question, cued, formatted, load_questions
from emlens.evals.rates import Rates, rates, wilson
from emlens.evals.responses import Response, Responses, respond
from emlens.evals.rubrics import RUBRICS
from emlens.evals.scores import Judge, Score, Scores, Verdict, human_labels, judge

__all__ = [
    "RUBRICS",
    "Agreement",
    "Judge",
    "LocalJudge",
    "ProbeJudge",
    "Question",
    "Rates",
    "Response",
    "Responses",
    "Score",
    "Scores",
    "Trust",
    "Verdict",
    "agreement",
    "cued",
    "formatted",
    "human_labels",
    "judge",
    "load_questions",
    "rates",
    "respond",
    "wilson",
]
