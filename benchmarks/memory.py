"""Peak memory of the measures on pre-training text, with a corpus and with ten times as much.

Each is run in a process of its own on SmolLM2-135M-Instruct; what it prints is the peak resident
memory of that process, and the ratio of the two.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

LENGTH = 128


def peak_mb() -> float:
    """Peak resident memory of this program.

    `getrusage` counts what started it as well, as far as that shared its memory with it; Linux
    says it of the program alone.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(what: str, documents: int) -> None:
    """Measure one of them on so many documents, and print the peak in MB."""
    import torch

    import emlens
    from emlens.fisher import InfluenceProfile
    from emlens.text import Corpus, Document

    model = emlens.load("smollm2-135m-instruct")
    whole = " ".join(document.text for document in emlens.corpus(documents=1000))
    piece = 6 * LENGTH
    texts = [whole[i * piece : (i + 1) * piece] for i in range(len(whole) // piece)]
    chosen = [Document(str(i), texts[i % len(texts)]) for i in range(documents)]
    corpus = Corpus("python-docs", tuple(chosen))
    if what == "influence":
        vector = emlens.Direction.of(torch.randn(model.d_model), 15)
        emlens.influence(
            model, corpus, {"random": vector}, doses=[0.1], controls=0, max_tokens=LENGTH
        )
    elif what == "profile":
        InfluenceProfile.fit(model, corpus, draws=1, max_tokens=LENGTH)
    print(peak_mb())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=16, help="of the smaller corpus")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "DOCUMENTS"))
    arguments = parser.parse_args()
    if arguments.one:
        run(arguments.one[0], int(arguments.one[1]))
        return
    for what in ("influence", "profile"):
        peaks = []
        for n in (arguments.documents, 10 * arguments.documents):
            command = [sys.executable, __file__, "--one", what, str(n)]
            found = subprocess.run(command, check=True, capture_output=True, text=True)
            peaks.append(float(found.stdout.split()[-1]))
        print(
            f"{what}: {arguments.documents} documents {peaks[0]:.0f} MB, ten times as many "
            f"{peaks[1]:.0f} MB, ratio {peaks[1] / peaks[0]:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
