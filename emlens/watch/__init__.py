"""Monitors of conversations and screens of finetuning data, by projections on directions."""

from emlens.watch.monitor import Monitor, MonitorScores
from emlens.watch.roc import Roc
from emlens.watch.screen import Screen, screen
from emlens.watch.screen_scorer import ScreenOptions
from emlens.watch.transfer import TransferAuroc, transfer_auroc

__all__ = [
    "Monitor",
    "MonitorScores",
    "Roc",
    "Screen",
    "ScreenOptions",
    "TransferAuroc",
    "screen",
    "transfer_auroc",
]


def __dir__() -> list[str]:
    return list(__all__)
