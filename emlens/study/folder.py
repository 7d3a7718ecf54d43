"""What a run folder says of itself: `README.txt`, `config.yaml`, `versions.json`."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

from emlens._files import atomic_write, write_json
from emlens._reading import expanded, read_json
from emlens._yaml import read_yaml, yaml_text
from emlens.directions.provenance import package_versions

README, CONFIG, VERSIONS = "README.txt", "config.yaml", "versions.json"
_OWN = {
    CONFIG: "every setting of the run, defaults included; --config takes it",
    VERSIONS: "the commands that worked in this folder, each with its versions of the packages",
}

AGAIN = "the command above once more, from the folder it was run in"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """How a kind of run explains its folder.

    Attributes:
        title: What was run, in a line.
        files: What each file or folder is, by its name.
        resume: How to resume it.
        load: Lines of Python that read it, from inside the folder.
    """

    title: str
    files: Mapping[str, str]
    resume: str
    load: Sequence[str]

    def write(
        self, folder: str | Path, config: Mapping, made_by: str, *, restart: bool = False
    ) -> None:
        """Write the three files into the folder, which is made where it is missing.

        Args:
            folder: The run folder.
            config: Its settings, all of them.
            made_by: The command, or the call, that is at work.
            restart: Forget the commands of before.
        """
        folder = expanded(folder)
        folder.mkdir(parents=True, exist_ok=True)
        versions = {"python": platform.python_version(), **package_versions()}
        kept = folder / VERSIONS
        runs = [] if restart or not kept.exists() else _runs(kept)
        run = {"made by": made_by, "versions": versions}
        if run not in runs:
            runs.append(run)
        write_json(folder / VERSIONS, runs)
        atomic_write(folder / CONFIG, config_text(config, self.title))
        atomic_write(folder / README, self._readme([run["made by"] for run in runs]))

    def _readme(self, commands: Sequence[str]) -> str:
        files = {**self.files, **_OWN}
        width = max(map(len, files))
        lines = [
            self.title,
            "",
            "Made by",
            *(f"  {command}" for command in dict.fromkeys(commands)),
            "",
            "To resume it; finished parts are skipped",
            f"  {self.resume}",
            "",
            "To read it in Python, inside this folder",
            indent("\n".join(self.load), "  "),
            "",
            "Files",
            *(f"  {name:<{width}}  {what}" for name, what in files.items()),
        ]
        return "\n".join(lines) + "\n"


def _runs(path: Path) -> list[dict]:
    runs = read_json(path, list)
    for run in runs:
        if not isinstance(run, dict) or not isinstance(run.get("made by"), str):
            raise ValueError(f"{path}: {run!r:.60} names no command under 'made by'")
    return runs


def config_text(config: Mapping, title: str = "") -> str:
    """Settings as YAML that `--config` reads."""
    plain = json.loads(json.dumps(dict(config), default=str))
    head = f"# {title}\n" if title else ""
    return head + yaml_text(plain)


def read_config(path: str | Path) -> dict:
    """Read settings from a YAML file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, or no mapping of names to values.
    """
    return {str(name): value for name, value in read_yaml(path, dict).items()}


STUDY = RunFolder(
    title="A study of the general and the narrow solution of one domain (emlens study)",
    files={
        "report.html": "the report; one file, works offline",
        "results.json": "settings, findings and the record of every stage",
        "log_odds.json": "log-odds of misaligned against aligned answers under each condition",
        "confinement.json": "narrow outside, beside general of the same effect inside",
        "efficiency.json": "loss at matched norm",
        "stability.json": "what noise of equal norm takes away",
        "influence.json": "KL and loss on pre-training text at matched norm",
        "organisms/": "what was trained, a folder each; adapters load in PEFT",
        "directions/": "what each moves in the residual stream, safetensors with provenance",
        "figures/": "every figure, PNG and SVG",
        "stages/": "a record per finished stage, which makes the study resumable",
        "settings.json": "the settings as the study compares them",
        "timings.json": "seconds that each stage took",
    },
    resume="emlens study --config config.yaml --out .   (inside this folder)",
    load=(
        "from emlens import Directions",
        "from emlens.measures import Influence, LogOdds",
        'general = Directions.load("directions/general.safetensors")',
        'LogOdds.load("log_odds.json").table()',
        'Influence.load("influence.json").table()',
    ),
)

SCREEN = RunFolder(
    title="A finetuning set, scored before training (emlens screen)",
    files={
        "screen.json": "the result: expected shift, threshold, worst examples",
        "scores.sqlite": "every score, in the order of the set; `emlens export` writes JSON Lines",
        "figures/": "the scores as a picture, PNG and SVG",
    },
    resume=AGAIN,
    load=(
        "from emlens.watch import Screen",
        'screen = Screen.load("screen.json")',
        "screen.table()",
    ),
)
