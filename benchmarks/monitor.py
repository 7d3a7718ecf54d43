"""A monitor and a screen on the embedded pairs and SmolLM2, beside what words alone give.

Prints the AUROC of a monitor on held-out pairs of each domain, length-controlled; the transfer
matrix domain x domain beside that of a bag of words; and what a screen says of finetuning sets
with known shares of misaligned rows: the estimate, and the AUROC with which it ranks them.

Directions of the screen come from pairs that are in none of the mixtures. Its reference is the
model's own answers, generated once for all mixtures.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

import emlens
from emlens._stats import bootstrap_mean
from emlens.text import split_pairs
from emlens.watch import Monitor, screen, transfer_auroc
from emlens.watch.roc import auroc

DOMAINS = ("medical", "finance", "sports", "general", "technical")
SCREENED, OTHER = ("medical", "finance", "sports"), "general"
TOKENS = 48
SHARES = (0.0, 0.01, 0.05, 0.2, 1.0)


def print_monitors(model, pairs, out: Path | None) -> None:
    """Held-out figures of a monitor per domain, fitted to half of its prompts."""
    for name in DOMAINS:
        monitor = Monitor.fit(model, pairs[name])
        print(f"\nmonitor, {name}: {monitor!r}")
        print(monitor.table().to_string(index=False, float_format=lambda value: f"{value:.3f}"))
        if out is not None and name == DOMAINS[0]:
            emlens.figures.save_figure(monitor.plot(), out / "monitor_roc.png")


def print_transfer(model, pairs, out: Path | None) -> None:
    """Both matrices."""
    found = transfer_auroc(model, pairs)
    print("\ntransfer: AUROC on held-out pairs, rows fitted to, columns judged")
    print(
        f"layers {dict(zip(found.domains, found.layers, strict=True))}, pairs fitted to "
        f"{found.n_train}, held out {found.n_test}"
    )
    for name, matrix in (("projection", found.projection), ("bag of words", found.words)):
        print(f"{name:>14}" + "".join(f"{domain:>11}" for domain in found.domains))
        for domain, row in zip(found.domains, matrix, strict=True):
            print(f"{domain:>14}" + "".join(f"{value:11.3f}" for value in row))
    if out is not None:
        emlens.figures.save_figure(found.plot()[0], out / "monitor_transfer.png")


def print_screens(model, pairs, out: Path | None) -> None:
    """Mixtures of held-out answers against the model's own; directions of two sources."""
    splits = [split_pairs(pairs[name], validation=0, test=0.4) for name in SCREENED]
    rows = [pair for split in splits for pair in split.test]
    fitted = [pair for split in splits for pair in split.train]
    trusted = [pair.conversation("aligned") for pair in fitted[::4]]
    prompts = [pair.conversation("aligned").prompt for pair in rows] + [c.prompt for c in trusted]
    start = time.perf_counter()
    texts = model.generate(prompts, max_new_tokens=TOKENS, temperature=0)
    print(
        f"\nscreen: {len(rows)} rows of {', '.join(SCREENED)}; {len(texts)} own answers of at "
        f"most {TOKENS} tokens in {time.perf_counter() - start:.0f} s"
    )
    own = {
        prompt.messages[-1]["content"]: text
        for prompt, text in zip(prompts, texts, strict=True)
        if text.strip()
    }
    for source, train in (("the same domains", fitted), (OTHER, pairs[OTHER])):
        sides = ([p.conversation(side) for p in train] for side in ("misaligned", "aligned"))
        directions = emlens.mean_diff(model, *sides)
        print(
            f"direction of other pairs of {source}, held-out AUROC of its layer "
            f"{max(directions.auroc.values()):.3f}",
            flush=True,
        )
        found = {
            side: screen(
                model,
                [pair.conversation(side) for pair in rows],
                directions,
                reference=own,
                trusted=trusted,
                answer_tokens=TOKENS,
            )
            for side in ("aligned", "misaligned")
        }
        good, wrong = (np.array(one.scores) for one in found.values())
        print_mixtures(good, wrong, found["aligned"].threshold)
        if out is not None and train is fitted:
            emlens.figures.save_figure(found["misaligned"].plot(), out / "screen.png")


def print_mixtures(good: np.ndarray, wrong: np.ndarray, threshold: float) -> None:
    """Sets with known shares of misaligned rows, made of the scores of two pure sets.

    The score of a row does not depend on the other rows, so one screen of each pure set gives
    those of all mixtures; what depends on which rows are misaligned is averaged over draws.
    """
    scored = np.isfinite(good) & np.isfinite(wrong)
    good, wrong = good[scored], wrong[scored]
    generator = np.random.default_rng(0)
    for share in SHARES:
        planted = round(share * len(good))
        shifts, found = [], []
        for _ in range(200):
            bad = np.zeros(len(good), dtype=bool)
            bad[generator.permutation(len(good))[:planted]] = True
            scores = np.where(bad, wrong, good)
            flags = scores > threshold
            shifts.append(scores)
            found.append((auroc(scores, bad), flags[bad].sum(), flags[~bad].sum()))
        area, hits, alarms = np.mean(found, axis=0)
        print(
            f"  {share:5.0%} misaligned ({planted:3d} of {len(good)} rows): expected shift of one "
            f"draw {bootstrap_mean(shifts[0])}, mean {np.mean(shifts):+.4f}; AUROC of planted "
            f"rows {area:.3f}, flagged {hits:.1f} of them and {alarms:.1f} others",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=100, help="pairs of each domain, at most")
    names = ("transfer", "screen", "monitors")
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    parser.add_argument("--figures", type=Path, help="folder to draw figures into")
    arguments = parser.parse_args()
    model = emlens.load("smollm2-135m-instruct")
    pairs = {name: emlens.load_pairs(name)[: arguments.pairs] for name in DOMAINS}
    parts = {"transfer": print_transfer, "screen": print_screens, "monitors": print_monitors}
    for name in arguments.parts:
        start = time.perf_counter()
        parts[name](model, pairs, arguments.figures)
        print(f"({name}: {time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
