"""A study's folder: stages that are finished stay finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from emlens._reading import expanded, read_json
from emlens._runs import SETTINGS, Parts
from emlens.directions import Directions
from emlens.study.settings import StudySettings


class StudyStore:
    """Keeps each stage's record and artefacts under one folder, written atomically.

    A stage counts as finished when its record is there; the record is written last, so a stage
    that was interrupted runs again from its start.

    Args:
        folder: The study's folder; made where it is missing.
        settings: The study's settings.
        made_in: `identities` of the model; nothing where a finished study is read.
        restart: Forget the stages of an earlier study in the same folder.

    Raises:
        ValueError: If the folder holds a study with other settings (the differences are named).
    """

    def __init__(
        self,
        folder: Path,
        settings: StudySettings,
        made_in: Mapping[str, object] | None = None,
        *,
        restart: bool = False,
    ) -> None:
        self.folder = folder = expanded(folder)
        self.settings = settings
        self.stages = folder / "stages"
        self.stages.mkdir(parents=True, exist_ok=True)
        if restart:
            for record in (*self.stages.glob("*.json"), folder / SETTINGS):
                record.unlink(missing_ok=True)
        Parts(folder).keep_settings(
            {**settings.to_dict(), **(made_in or {})},
            f"the study in {folder}",
            "choose another folder, or restart it",
        )

    def stage(self, name: str, run: Callable[[], dict]) -> dict:
        """Return a stage's record: read where it is finished, else made by `run` and kept."""

        def timed() -> dict:
            start = time.monotonic()
            record = run()
            return {"record": record, "seconds": round(time.monotonic() - start, 1)}

        Parts(self.stages).part(f"{name}.json", timed)
        return self.record(name)

    def record(self, name: str) -> dict:
        """The record of a finished stage."""
        return self._kept(name)[0]

    def finished(self, name: str) -> bool:
        """Whether a stage is finished."""
        return Parts(self.stages).finished(f"{name}.json")

    def seconds(self) -> dict[str, float]:
        """Seconds that each finished stage took."""
        return {p.stem: self._kept(p.stem)[1] for p in sorted(self.stages.glob("*.json"))}

    def _kept(self, name: str) -> tuple[dict, float]:
        path = self.stages / f"{name}.json"
        found = read_json(path, dict)
        record, seconds = found.get("record"), found.get("seconds")
        if not isinstance(record, dict) or not isinstance(seconds, (int, float)):
            raise ValueError(
                f"{path} is not what a stage leaves: an object `record` and a number `seconds`; "
                "delete it, and the stage runs again"
            )
        return record, seconds

    def keep(self, name: str, directions: Directions) -> None:
        """Write directions under `directions/`."""
        directions.save(self._directions(name))

    def directions(self, name: str) -> Directions:
        """Read directions that `keep` wrote."""
        return Directions.load(self._directions(name))

    def _directions(self, name: str) -> Path:
        path = self.folder / "directions" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        return path
