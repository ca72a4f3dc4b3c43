"""Tell Snakemake that the files which `dvc pull` or `dvc checkout` restored are up to date.

DVC restores what is in the files, not their times nor Snakemake's records of how they were made, so Snakemake would
make everything again. This writes those records, with `snakemake --touch --forceall`. It runs by itself in a clone
where there are files but no records yet; after a checkout of another revision say `make adopt`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ADOPTING = "LSGM_ADOPTING"  # set while the inner Snakemake writes its records: it must not adopt in turn
BIN = Path(sys.executable).parent


def adopting() -> bool:
    """Whether this is the Snakemake that writes the records."""
    return ADOPTING in os.environ


def adopt_restored() -> None:
    """Adopt if there are restored files that Snakemake has no record of, and say so."""
    records = Path(".snakemake/metadata")
    if adopting() or (records.is_dir() and any(records.iterdir())):
        return
    if not Path("dvc.lock").exists() or not Path("checkpoints").is_dir():
        return
    if changed := differences():
        # Record the frozen configurations alone. They are then newer than what was made from them, so that it is made
        # again; without a record a configuration that params.yaml has left behind would go unseen.
        adopt("configs")
        how = f"made again, because dvc.lock does not describe {', '.join(changed)} as found here. {WAY_OUT}"
    else:
        adopt("all")
        how = "adopted as they are in dvc.lock."
    print(f"The files that DVC restored are {how}", file=sys.stderr)


WAY_OUT = (
    "To keep them, put the recorded state back (`git stash`, `dvc checkout`) and run `make adopt` first. Where that "
    "changes nothing, the cache or the remote is damaged: remove .dvc/cache/files and pull from a sound remote."
)


def adopt(target: str) -> None:
    """Write Snakemake's records for the existing files that ``target`` needs."""
    # --forceall: without it the jobs stay without a record, and a later change of a parameter goes unseen.
    # --rerun-incomplete: a killed job may have left its mark on files that were restored since.
    command = [str(BIN / "snakemake"), "--touch", "--forceall", "--rerun-incomplete", "--cores", "1", target]
    done = subprocess.run(command, env={**os.environ, ADOPTING: "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"`snakemake --touch` could not record the restored files:\n{done.stdout}{done.stderr}")


def differences() -> list[str]:
    """What in the workspace is not as it was recorded: outputs of a stage, or the rules that made them.

    Parameters and the library may have changed since: the restored frozen configurations tell what they were.
    """
    status = json.loads(_output(BIN / "dvc", "data", "status", "--json")).get("uncommitted", {})
    changed = [path for kind in ("modified", "deleted", "added") for path in status.get(kind, [])]
    # DVC leaves the results to git.
    changed += [line[3:] for line in _output("git", "status", "--porcelain", "--", "results").splitlines()]
    stages = yaml.safe_load(Path("dvc.lock").read_text())["stages"].values()
    if not changed:
        changed = damaged([entry for stage in stages for entry in stage.get("outs", [])])
    for stage in stages:
        for entry in stage.get("deps", []):
            path = Path(entry["path"])
            if path.parts[0] == "workflow" and path.is_file() and _md5(path) != entry["md5"]:
                changed.append(str(path))
    return changed


def damaged(outs: list[dict[str, Any]]) -> list[str]:
    """The files of the outputs ``outs`` of dvc.lock whose content is not what was recorded.

    DVC takes what comes from a remote for what it is called there (unless the remote has `verify`), and the workspace
    for what it put there: all files are read once, at 0.5 GB/s or so, before anything is built on them.
    """
    cache = Path(_output(BIN / "dvc", "cache", "dir").strip()) / "files" / "md5"
    found = []
    for out in outs:
        if Path(out["path"]).parts[0] == "results":  # in git
            continue
        listing = cache / out["md5"][:2] / out["md5"][2:]
        try:
            if f"{_md5(listing)}.dir" != out["md5"]:
                raise ValueError
            files = [(Path(out["path"], entry["relpath"]), entry["md5"]) for entry in json.loads(listing.read_text())]
        except (OSError, ValueError):
            found.append(f"{out['path']} (its list of files, {listing}, is missing or damaged)")
            continue
        found += [str(path) for path, md5 in files if not path.is_file() or _md5(path) != md5]
    return found


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _output(*command: str | Path) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as error:
        sys.exit(f"{command[0]} cannot be run ({error.strerror}); it tells which files `dvc pull` restored")
    except subprocess.CalledProcessError as error:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{error.stderr}")


if __name__ == "__main__":
    if changed := differences():
        sys.exit(f"Not adopted: dvc.lock does not describe {', '.join(changed)} as found here. {WAY_OUT}")
    adopt("all")
    print("The files in the workspace are adopted as they are in dvc.lock: Snakemake takes them as up to date.")
