"""Evaluation: questions, responses, judges, and the rates that follow from them."""

from emlens.evals.ablation import Ablation, Projected, ablation_table
from emlens.evals.agreement import Agreement, agreement
from emlens.evals.behaviour import Behaviour, Effect, JudgedRate, LogOddsJudge
from emlens.evals.local_judge import LocalJudge
from emlens.evals.logprob_judge import LogProbJudge
from emlens.evals.probe_judge import ProbeJudge
from emlens.evals.questions import Question, cued, formatted, load_questions
from emlens.evals.rank1_scalars import ScalarTable, scalar_table
from emlens.evals.rates import Rates, rates
from emlens.evals.responses import Response, Responses, respond
from emlens.evals.scores import Judge, Score, Scores, human_labels, judge
from emlens.evals.served_responses import respond_served
from emlens.evals.steering import SteeringSweep, steering_sweep
from emlens.evals.topics import TopicSplit, judged_topics, topic_split, topics
from emlens.evals.transfer import Transfer, transfer_table

__all__ = [
    "Ablation",
    "Agreement",
    "Behaviour",
    "Effect",
    "Judge",
    "JudgedRate",
    "LocalJudge",
    "LogOddsJudge",
    "LogProbJudge",
    "ProbeJudge",
    "Projected",
    "Question",
    "Rates",
    "Response",
    "Responses",
    "ScalarTable",
    "Score",
    "Scores",
    "SteeringSweep",
    "TopicSplit",
    "Transfer",
    "ablation_table",
    "agreement",
    "cued",
    "formatted",
    "human_labels",
    "judge",
    "judged_topics",
    "load_questions",
    "rates",
    "respond",
    "respond_served",
    "scalar_table",
    "steering_sweep",
    "topic_split",
    "topics",
    "transfer_table",
]


def __dir__() -> list[str]:
    return list(__all__)
