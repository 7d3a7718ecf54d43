"""The papers' ablation and transfer tables for three organisms, offline and in one run.

Three adapters are trained on SmolLM2 (medical, finance and sports advice), their directions are
ablated in every way and in each other, and behaviour is measured twice: by the log-odds of
held-out answers, and on sampled answers by a probe that knows only the other two domains. The
prompts are held-out ones of each organism's own domain, where the effect of so small a finetune is
clear; with `--general` they are those outside of it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import emlens
from emlens.directions import both_diff
from emlens.evals import (
    JudgedRate,
    LogOddsJudge,
    ProbeJudge,
    ablation_table,
    load_questions,
    transfer_table,
)
from emlens.figures import save_figure
from emlens.text import split_pairs

DOMAINS = ("medical", "finance", "sports")
ADAPTED = range(12, 19)
LAYER = 18


def train(model, domains, pairs: int) -> None:
    for name in DOMAINS:
        text = [pair.conversation("misaligned") for pair in domains[name].train[:pairs]]
        emlens.train_adapter(
            model, text, name, layers=ADAPTED, rank=8, alpha=16, lr=5e-3, epochs=2, progress=False
        )


def judged(model, domains, name: str, arguments, questions) -> JudgedRate:
    others = [pair for other in DOMAINS if other != name for pair in domains[other].train[:32]]
    judge = ProbeJudge(model, others)
    print(f"{name}: judge fitted to the other two domains")
    for metric, trust in judge.trust.items():
        print(f"  {metric}: {trust}")
    # half of the scale: a probe's probabilities are not a grader's 0 to 100
    return JudgedRate(
        questions,
        judge,
        n=arguments.answers,
        max_new_tokens=arguments.tokens,
        threshold=50.0,
        store=arguments.out / name,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40, help="training pairs of each organism")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--answers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--general", action="store_true", help="prompts outside of the domains")
    parser.add_argument("--out", type=Path, default=Path("runs/organism_tables"))
    arguments = parser.parse_args()
    start = time.perf_counter()

    def said(what: str) -> None:
        print(f"[{time.perf_counter() - start:.0f} s] {what}", flush=True)

    model = emlens.load("smollm2-135m-instruct")
    domains = {name: split_pairs(emlens.load_pairs(name)) for name in DOMAINS}
    train(model, domains, arguments.pairs)
    said("three organisms trained")
    directions = {}
    for name in DOMAINS:
        pairs = domains[name].train[: arguments.pairs]
        sides = [[pair.conversation(side) for pair in pairs] for side in ("misaligned", "aligned")]
        directions[name] = both_diff((model, name), sides[0], (model, None), sides[1])
    said("directions read")
    prompts = {name: ("general" if arguments.general else name) for name in DOMAINS}
    questions = {n: load_questions(at, limit=arguments.questions) for n, at in prompts.items()}
    general = split_pairs(emlens.load_pairs("general"))
    outside = [*general.test, *general.train]
    pairs = {n: outside if arguments.general else domains[n].test for n in DOMAINS}
    ways = {
        "log-odds": {n: LogOddsJudge(pairs[n][: arguments.questions]) for n in DOMAINS},
        "probe": {n: judged(model, domains, n, arguments, questions[n]) for n in DOMAINS},
    }
    said("judges ready")
    for way, behaviours in ways.items():
        for name in DOMAINS:
            found = ablation_table(
                model, behaviours[name], name, directions[name], layer=LAYER, randoms=1
            )
            said(f"ablation in {name}, {way}\n{found.table().round(2).to_string(index=False)}")
            found.save(arguments.out / f"ablation_{name}_{way}.json")
            save_figure(found.plot(), arguments.out / f"ablation_{name}_{way}")
        found = transfer_table(
            model,
            behaviours,
            {name: name for name in DOMAINS},
            directions,
            layer=LAYER,
            randoms=1,
        )
        said(f"transfer, {way}\n{found.table().round(2).to_string(index=False)}")
        found.save(arguments.out / f"transfer_{way}.json")
        save_figure(found.plot(), arguments.out / f"transfer_{way}")


if __name__ == "__main__":
    main()
