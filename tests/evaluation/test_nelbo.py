"""The NELBO of a set in parts: the same numbers for any number of jobs, and after a kill; the estimators agree."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lsgm import checkpoint
from lsgm.config import EstimatorConfig, ImageConfig, NCSNppConfig, NELBOConfig, SDEConfig
from lsgm.config.stages import NELBOStage
from lsgm.data.store import ImageStore
from lsgm.errors import LSGMError
from lsgm.evaluation import nelbo
from lsgm.evaluation.nelbo import make_part
from lsgm.evaluation.nelbo_results import SetNELBO, read_parts
from lsgm.model import LSGM

CPU = torch.device("cpu")
SETTINGS = NELBOConfig(
    images=22, batch=4, steps=8, iw_samples=2, extra_estimators=["bound"], check_images=6, seed=3
)  # six chunks, the last one of two images
STAGE = NELBOStage(model="tiny", dataset="mnist", nelbo=SETTINGS, code="c0de")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of an LSGM and of a VAE, untrained, their priors not N(0, I)."""
    from lsgm.config import ConvVAEConfig

    folder = tmp_path_factory.mktemp("models")
    image = ImageConfig(channels=1, size=28, padded_size=32, binary=True)
    vae = ConvVAEConfig(backbone="conv", channels=4, channel_mult=[1, 2, 2, 2], latents=4)
    prior = NCSNppConfig(channels=8, scales=1, cells_per_scale=1, dropout=0, embedding_dim=16, mixing_logit_init=0)
    torch.manual_seed(0)
    lsgm = LSGM(image, vae, prior, SDEConfig(time_eps=0.01))
    for parameter in lsgm.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    checkpoint.save(lsgm, folder / "lsgm", [], {})
    checkpoint.save(LSGM(image, vae), folder / "vae", [], {})
    return folder / "lsgm", folder / "vae"


def part(
    models: tuple[Path, Path], store: ImageStore, out: Path, part: int = 0, parts: int = 1, stage: NELBOStage = STAGE
) -> Path:
    make_part(stage, store.path, *models, out, CPU, part, parts)
    return out


@pytest.fixture(scope="module")
def whole(
    models: tuple[Path, Path], mnist_store: ImageStore, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, SetNELBO]:
    path = part(models, mnist_store, tmp_path_factory.mktemp("whole") / "all")
    return read_parts([path])[1]


def assert_same(one: dict[str, SetNELBO], two: dict[str, SetNELBO]) -> None:
    assert list(one) == list(two)
    for key, found in one.items():
        for name in ("nelbo", "reconstruction", "kl", "iw_bound"):
            assert torch.equal(getattr(found, name), getattr(two[key], name)), (key, name)
        assert found.nfe == two[key].nfe


@pytest.mark.parametrize("parts", [2, 4, 9])
def test_any_number_of_jobs_gives_the_same_numbers(
    models: tuple[Path, Path], mnist_store: ImageStore, whole: dict[str, SetNELBO], tmp_path: Path, parts: int
) -> None:
    """More jobs than chunks too, in which case some have nothing to do."""
    paths = [part(models, mnist_store, tmp_path / str(i), i, parts) for i in range(parts)]
    header, found = read_parts(paths[::-1])
    assert header["images"] == 22
    assert_same(found, whole)


def test_the_numbers_are_those_of_the_model(
    models: tuple[Path, Path], mnist_store: ImageStore, whole: dict[str, SetNELBO]
) -> None:
    """Image by image, and in nats and bits per dimension with their standard errors."""
    assert list(whole) == ["vae", "lsgm", "lsgm_bound", "lsgm_with_normal_prior"]
    lsgm = checkpoint.load(models[0])
    test = mnist_store.images("test")
    chosen = np.sort(np.random.default_rng(3).permutation(len(test))[:22])
    from lsgm.data.batches import preprocess

    x = preprocess(torch.from_numpy(np.array(test[chosen])), torch.Generator().manual_seed(3), 32)
    for key, settings in (("lsgm", EstimatorConfig(steps=8)), ("lsgm_bound", EstimatorConfig(estimator="bound"))):
        streams = lsgm.per_sample_noise(3, range(4))
        terms = [lsgm.nelbo_terms(x[:4], streams, settings) for _ in range(2)]
        expected = torch.stack([t.nelbo for t in terms]).mean(0)
        torch.testing.assert_close(whole[key].nelbo[:4], expected.double(), rtol=1e-5, atol=1e-3)
    found = whole["lsgm"]
    torch.testing.assert_close(found.nelbo, found.reconstruction + found.kl, rtol=1e-5, atol=1e-3)
    assert found.iw_bound is not None and (found.iw_bound <= found.nelbo + 1e-6).all()
    summary, bit = found.summary(), math.log(2) * 784
    assert summary["bpd"] == pytest.approx(summary["nelbo"] / bit)
    assert summary["stderr"] == pytest.approx(np.std(found.nelbo.numpy(), ddof=1) / 22**0.5)
    assert summary["bpd_stderr"] == pytest.approx(summary["stderr"] / bit)
    assert summary["iw_bpd_stderr"] == pytest.approx(summary["iw_stderr"] / bit)
    assert whole["vae"].nfe == 0 < summary["nfe"]


def test_the_result_does_not_depend_on_the_batch(
    models: tuple[Path, Path], mnist_store: ImageStore, whole: dict[str, SetNELBO], tmp_path: Path
) -> None:
    other = STAGE.model_copy(update={"nelbo": SETTINGS.model_copy(update={"batch": 11})})
    found = read_parts([part(models, mnist_store, tmp_path / "out", stage=other)])[1]
    for key, expected in whole.items():
        torch.testing.assert_close(found[key].nelbo, expected.nelbo, rtol=1e-5, atol=2e-3)
    check, other_check = whole["lsgm"].check, found["lsgm"].check
    assert check is not None and other_check is not None
    torch.testing.assert_close(check.noise, other_check.noise, rtol=1e-3, atol=2e-3)


def test_errors_of_the_estimates_are_reported(
    models: tuple[Path, Path], mnist_store: ImageStore, whole: dict[str, SetNELBO], tmp_path: Path
) -> None:
    """That of the solver is the true one, and that of the trace goes down with the number of probes."""
    fine = STAGE.model_copy(update={"nelbo": NELBOConfig(images=22, batch=4, steps=96, check_images=6, seed=3)})
    summary = read_parts([part(models, mnist_store, tmp_path / "fine", stage=fine)])[1]["lsgm"].summary()
    assert summary["check_images"] == 6 and "solver_error" not in whole["vae"].summary()
    lsgm = checkpoint.load(models[0])
    from lsgm.data.batches import preprocess

    test = mnist_store.images("test")
    chosen = np.sort(np.random.default_rng(3).permutation(len(test))[:22])
    x = preprocess(torch.from_numpy(np.array(test[chosen])), torch.Generator().manual_seed(3), 32)[:6]
    streams = [lsgm.per_sample_noise(3, range(6)) for _ in range(2)]
    coarse = lsgm.nelbo_terms(x, streams[0], EstimatorConfig(steps=96)).nelbo
    exact = lsgm.nelbo_terms(x, streams[1], EstimatorConfig(solver="rk45", tol=1e-4)).nelbo
    true = (coarse - exact).double()
    assert summary["solver_error"] == pytest.approx(true.mean().item(), rel=0.3, abs=3e-3)
    assert summary["solver_rms"] == pytest.approx(true.square().mean().sqrt().item(), rel=0.3, abs=3e-3)
    bound = whole["lsgm_bound"].summary()
    assert bound["solver_error"] is None and bound["estimate_std"] > 0
    spread = {}
    for probes in (1, 16):
        config = NELBOConfig(images=64, batch=64, steps=4, probes=probes, check_images=64, seed=3)
        stage = STAGE.model_copy(update={"nelbo": config})
        spread[probes] = read_parts([part(models, mnist_store, tmp_path / f"{probes}", stage=stage)])[1]["lsgm"]
    ratio = spread[1].summary()["estimate_std"] / spread[16].summary()["estimate_std"]
    assert ratio == pytest.approx(4, rel=0.4)  # 64 images: a standard error of an eighth
    exact_trace = STAGE.model_copy(
        update={"nelbo": NELBOConfig(images=2, batch=2, steps=4, probe="exact", check_images=2)}
    )
    found = read_parts([part(models, mnist_store, tmp_path / "exact", stage=exact_trace)])[1]["lsgm"].summary()
    assert found["estimate_std"] == pytest.approx(0, abs=1e-3)


def test_goes_on_where_it_was_stopped(
    models: tuple[Path, Path],
    mnist_store: ImageStore,
    whole: dict[str, SetNELBO],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the middle of a chunk and of a line; what was done is not done again."""
    calls = 0
    original = nelbo._measure

    def fails(*args: Any, **settings: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise RuntimeError("the machine is gone")
        return original(*args, **settings)

    out, state = tmp_path / "out", tmp_path / "out.resume"
    monkeypatch.setattr(nelbo, "_measure", fails)
    with pytest.raises(RuntimeError, match="gone"):
        part(models, mnist_store, out)
    assert not out.exists() and len(state.read_text().splitlines()) == 1 + 6
    state.write_text(state.read_text() + '{"chunk": 1, "prior": "lsgm_bou')
    part(models, mnist_store, out)
    assert calls == 7 + 24 - 6
    assert not state.exists()
    assert_same(read_parts([out])[1], whole)


def test_killed_by_the_system_it_goes_on(
    models: tuple[Path, Path], mnist_store: ImageStore, whole: dict[str, SetNELBO], tmp_path: Path
) -> None:
    (tmp_path / "nelbo.json").write_text(STAGE.model_dump_json())
    out, state = tmp_path / "out", tmp_path / "states" / "tiny"
    command = [sys.executable, "-m", "lsgm.cli", "nelbo", "--config", tmp_path / "nelbo.json", "--out", out]
    command += ["--data", mnist_store.path, "--model", models[0], "--vae", models[1], "--resume", state]
    command += ["--device", "cpu"]
    slow = "import time; from lsgm.evaluation import nelbo as l; m = l._measure\n"
    slow += "def measure(*a, **k): time.sleep(0.3); return m(*a, **k)\n"
    slow += f"l._measure = measure\nfrom lsgm.cli import main; main({[str(c) for c in command[3:]]})"
    with subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.DEVNULL) as process:
        while not state.exists() or len(state.read_text().splitlines()) < 4:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
    assert not out.exists()
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stderr
    assert_same(read_parts([out])[1], whole)


def test_what_was_done_with_other_settings_is_not_gone_on_with(
    models: tuple[Path, Path],
    mnist_store: ImageStore,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other = STAGE.model_copy(update={"nelbo": SETTINGS.model_copy(update={"seed": 4})})
    left = part(models, mnist_store, tmp_path / "other", stage=other)
    left.rename(tmp_path / "out.resume")  # whole, but of another evaluation
    with caplog.at_level("INFO", logger="lsgm"):
        part(models, mnist_store, tmp_path / "out")
    assert "was computed with a different stage; starting over" in caplog.text
    first = json.loads((tmp_path / "out").read_text().splitlines()[0])
    assert first["stage"]["nelbo"] == SETTINGS.model_dump()


def test_another_model_is_begun_anew(
    models: tuple[Path, Path], mnist_store: ImageStore, whole: dict[str, SetNELBO], tmp_path: Path
) -> None:
    state = part(models, mnist_store, tmp_path / "old").rename(tmp_path / "out.resume")
    lines = state.read_text().splitlines()
    header = json.loads(lines[0]) | {"model": "0" * 64}
    spoilt = [json.dumps(json.loads(line) | {"nelbo": [0.0] * 4}) for line in lines[1:]]
    state.write_text("\n".join([json.dumps(header), *spoilt]) + "\n")
    assert_same(read_parts([part(models, mnist_store, tmp_path / "out")])[1], whole)


def test_all_test_images(models: tuple[Path, Path], small_store: ImageStore, tmp_path: Path) -> None:
    stage = STAGE.model_copy(update={"nelbo": NELBOConfig(images=None, batch=4, steps=4)})
    header, found = read_parts([part(models, small_store, tmp_path / "out", stage=stage)])
    assert header["images"] == len(found["vae"].nelbo) == 10
    assert found["vae"].iw_bound is None


def test_parts_that_do_not_belong_together_are_refused(
    models: tuple[Path, Path], mnist_store: ImageStore, tmp_path: Path
) -> None:
    one = part(models, mnist_store, tmp_path / "one", 0, 2)
    with pytest.raises(LSGMError, match=r"NELBO of tiny: of 2 parts \[1\] are missing"):
        read_parts([one])
    other = STAGE.model_copy(update={"nelbo": SETTINGS.model_copy(update={"seed": 4})})
    two = part(models, mnist_store, tmp_path / "two", 1, 2, other)
    with pytest.raises(LSGMError, match="two: is of another model, or made with other settings"):
        read_parts([one, two])
    again = part(models, mnist_store, tmp_path / "again", 0, 2)
    with pytest.raises(LSGMError, match="again: is part 0 .* which another file is too"):
        read_parts([one, again])
    alone = part(models, mnist_store, tmp_path / "alone")
    alone.write_text("".join(alone.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(LSGMError, match="NELBO of tiny: .* images .*alone; delete"):
        read_parts([alone])
    one.write_text("{")
    with pytest.raises(LSGMError, match="one: line 1: is not valid JSON .*delete it"):
        read_parts([one])
    with pytest.raises(LSGMError, match="--part: expected 0 to 1, found 2"):
        part(models, mnist_store, tmp_path / "three", 2, 2)
    many = STAGE.model_copy(update={"nelbo": NELBOConfig(images=10_001)})
    with pytest.raises(LSGMError, match="evaluate.images: expected at most the 10000 test images"):
        part(models, mnist_store, tmp_path / "four", stage=many)
