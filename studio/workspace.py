"""The folder that holds everything a user makes: runs, other jobs, the queue, adapters, datasets and pictures."""

from __future__ import annotations

from pathlib import Path

from studio import paths


class Workspace:
    """`root` is $STUDIO_HOME, or else the current folder, where none is given. Nothing is written before `create`."""

    open_folders = ("runs", "jobs", "library", "datasets", "pictures")
    """Those whose files are shown and given out; all others are the studio's own."""

    def __init__(self, root: str | Path | None = None) -> None:
        self.root = Path(root or paths.home()).expanduser().resolve()
        self.runs = self.root / "runs"
        """Run folders of trainings, the same ones that the command line writes."""
        self.jobs = self.root / "jobs"
        """Folders of all other jobs: drawing, blending, ..."""
        self.queue = self.root / "queue"
        """One entry for each job that waits, and in `queue/running` for each that a process has taken."""
        self.library = self.root / "library"
        """Adapters, each a .safetensors file with a picture of its name beside it."""
        self.datasets = self.root / "datasets"
        """Uploaded pictures and their captions, one folder for each dataset."""
        self.pictures = self.root / "pictures"
        """What was drawn: PNGs that say how they were made."""
        self.uploads = self.root / ".uploads"
        """What a browser sent and nobody has put anywhere yet."""

    def __repr__(self) -> str:
        return f"Workspace({str(self.root)!r})"

    def create(self) -> Workspace:
        """Makes the folders that are not there yet. Returns itself."""
        shown = (self.root / name for name in self.open_folders)
        for folder in (*shown, self.queue / "running", self.uploads):
            folder.mkdir(parents=True, exist_ok=True)
        return self

    def outside(self, source: str) -> str:
        """How others may know a file: by its place in the workspace, or else by its name alone. What is no file
        stays as it is."""
        path = Path(source)
        if not path.is_absolute():
            return source
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else path.name

    def inside(self, source: str) -> str:
        """The file of the workspace that `outside` named, or `source` where it has none such."""
        path = self.root / source
        return str(path) if source and path.exists() else source
