"""Pushing to a DVC remote and pulling from it, whole and interrupted: a folder, and an S3 server on loopback."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import random
import resource
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ..conftest import Project

REPOSITORY = Path(__file__).parents[2]
FILES = 12
LARGE = 1 << 20
MISSING = "the extra `s3` is not installed: pip install -r requirements.lock"


@pytest.fixture
def project(fresh: Project, tmp_path: Path) -> Project:
    """A repository with this one's settings of DVC and a folder of data, committed, pushed nowhere yet."""
    project = type(fresh)(tmp_path / "project", dict(fresh.environment))
    draw = random.Random(0)
    (project.path / "data").mkdir(parents=True)
    for i in range(FILES):
        (project.path / f"data/{i}").write_bytes(draw.randbytes(10_000 + i if i else 2 * LARGE))
    project.run("git", "init", "--quiet")
    project.run("dvc", "init", "--quiet")
    for name in (".dvc/config", ".dvcignore"):
        (project.path / name).write_bytes((REPOSITORY / name).read_bytes())
    project.run("dvc", "add", "--quiet", "data")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message", "data")
    return project


def clone(project: Project, path: Path) -> Project:
    """A clone of the project that knows its remote."""
    project.run("git", "clone", "--quiet", str(project.path), str(path))
    (path / ".dvc/config.local").write_bytes((project.path / ".dvc/config.local").read_bytes())
    return type(project)(path, project.environment)


def data(project: Project) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (project.path / "data").iterdir()}


class S3:
    """An S3 server with a bucket. It takes `left` more objects, then holds uploads until `go_on`, to refuse them."""

    def __init__(self) -> None:
        moto = pytest.importorskip("moto.server", reason=MISSING)
        pytest.importorskip("flask_cors", reason=MISSING)
        pytest.importorskip("dvc_s3", reason=MISSING)
        import boto3
        from werkzeug.serving import make_server

        self.left, self.lock = math.inf, threading.Lock()
        self.full, self.go_on = threading.Event(), threading.Event()
        self.moto = moto.DomainDispatcherApplication(moto.create_backend_app)
        self.server = make_server("127.0.0.1", 0, self.answer, threaded=True, request_handler=moto.MotoRequestHandler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.environment = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        urllib.request.urlopen(f"{self.url}/moto-api/reset", data=b"")  # its buckets belong to the process
        keys = {name.lower(): self.environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        self.client = boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", **keys)
        self.client.create_bucket(Bucket="bucket")

    def answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        if environ["REQUEST_METHOD"] == "PUT" and "/files/md5/" in environ["PATH_INFO"]:
            with self.lock:
                self.left -= 1
            if self.left < 0:
                self.full.set()
                self.go_on.wait()
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start_response("403 Forbidden", [("Content-Length", "0")])
                return [b""]
        return self.moto(environ, start_response)

    def objects(self) -> dict[str, bytes]:
        """The content of each object by the hash that is its name."""
        keys = [entry["Key"] for entry in self.client.list_objects_v2(Bucket="bucket").get("Contents", [])]
        return {
            "".join(key.split("/")[-2:]): self.client.get_object(Bucket="bucket", Key=key)["Body"].read()
            for key in keys
        }


@pytest.fixture
def s3(project: Project) -> Iterator[S3]:
    """An S3 server, the project's remote."""
    server = S3()
    project.environment |= server.environment
    project.run("dvc", "remote", "add", "--quiet", "--local", "--default", "storage", "s3://bucket/lsgm")
    project.run("dvc", "remote", "modify", "--quiet", "--local", "storage", "endpointurl", server.url)
    yield server
    server.go_on.set()
    server.server.shutdown()


@pytest.mark.parametrize("how", ["refused", "killed"])
def test_an_interrupted_push_to_s3_is_completed_by_the_next(project: Project, s3: S3, tmp_path: Path, how: str) -> None:
    s3.left = 5
    if how == "refused":  # credentials that expire on the way, say
        s3.go_on.set()
        assert "failed to push" in project.run("dvc", "push", fails=True)
    else:
        process = subprocess.Popen(["dvc", "push", "--quiet"], cwd=project.path, env=project.environment)
        assert s3.full.wait(60)
        process.kill()
        process.wait()
        s3.go_on.set()
    there = s3.objects()
    assert 0 < len(there) <= 5
    assert not [name for name in there if name.endswith(".dir")]  # the list of files comes after the files
    early = clone(project, tmp_path / "early")
    assert "data" in early.run("dvc", "pull", fails=True)
    assert not (early.path / "data").exists()

    s3.left = math.inf
    project.run("dvc", "push")
    assert "in sync" in project.run("dvc", "status", "--cloud")
    there = s3.objects()
    assert len(there) == FILES + 1
    assert all(hashlib.md5(content).hexdigest() == name.removesuffix(".dir") for name, content in there.items())
    for late in (early, clone(project, tmp_path / "late")):
        late.run("dvc", "pull", "--quiet")
        assert data(late) == data(project)


def test_an_interrupted_push_to_a_folder_is_completed_by_the_next(project: Project, tmp_path: Path) -> None:
    storage = tmp_path / "storage"
    project.run("dvc", "remote", "add", "--quiet", "--local", "--default", "storage", str(storage))
    done = subprocess.run(  # on a disk with room for small files
        ["dvc", "push"],
        cwd=project.path,
        env=project.environment,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (LARGE, resource.RLIM_INFINITY)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode != 0, done.stdout
    assert os.strerror(errno.EFBIG) in done.stdout
    whole = [path for path in storage.rglob("*") if path.is_file() and path.suffix != ".tmp"]
    assert sorted(path.stat().st_size for path in whole) == [10_000 + i for i in range(1, FILES)]
    project.run("dvc", "push")
    assert "in sync" in project.run("dvc", "status", "--cloud")
    late = clone(project, tmp_path / "late")
    late.run("dvc", "pull", "--quiet")
    assert data(late) == data(project)
