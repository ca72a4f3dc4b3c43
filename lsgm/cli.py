"""The command line: one sub-command per stage of the pipeline."""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import re
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lsgm.config import (
    STAGES,
    EvaluateStage,
    IllustrateStage,
    NELBOStage,
    PrepareStage,
    PretrainStage,
    SampleStage,
    StatisticsStage,
    TabulateStage,
    TrainStage,
    load_stage,
)
from lsgm.errors import LSGMError, SolverError, Stopped
from lsgm.files import atomic, copy, seal, sha256, write_json
from lsgm.progress import clock, log, set_up_logging

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|bad_alloc", re.IGNORECASE)
GRID = 256  # images of a grid of samples

# torch takes seconds to import: each command imports what it needs, and `lsgm --help` is there at once.


def prepare(args: argparse.Namespace) -> None:
    from lsgm.data import prepare

    prepare.prepare(load_stage(PrepareStage, args.config), args.out)


def statistics(args: argparse.Namespace) -> None:
    from lsgm.evaluation import statistics

    statistics.make_reference(load_stage(StatisticsStage, args.config), args.data, args.out, device(args.device))


def pretrain(args: argparse.Namespace) -> str:
    from lsgm.training.pretrain import pretrain as run

    stage = load_stage(PretrainStage, args.config)
    return str(run(stage, args.data, args.out, device(args.device), args.tensorboard, args.state))


def train(args: argparse.Namespace) -> str:
    from lsgm.training.train import train as run

    stage = load_stage(TrainStage, args.config)
    return str(run(stage, args.data, args.vae, args.out, device(args.device), args.tensorboard, args.state))


def sample(args: argparse.Namespace) -> str:
    import numpy as np

    from lsgm import checkpoint
    from lsgm.evaluation.figures import save_grid
    from lsgm.model import SampleInfo

    stage = load_stage(SampleStage, args.config)
    config = stage.sample
    model = checkpoint.load(args.model, device(args.device))
    failed: str | None = None
    if config.compile:
        model.compile_prior()
    image, start, done, nfe = model.image, time.perf_counter(), 0, 0.0
    shape = (config.count, image.channels, image.size, image.size)
    shown: list[NDArray[np.uint8]] = []  # the first ones, for the grid
    with atomic(args.out / "samples.npy") as part, part.open("w+b") as file:
        # Not a memory map: where the disk is full, that kills the process in place of raising.
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        first = file.tell()
        try:
            for images, evaluations in model.sample_batches(**config.model_dump(exclude={"compile", "give_up"})):
                pixels = images.mul(255).round().byte().cpu().contiguous().numpy()
                file.write(pixels.data)
                shown += [pixels[: max(0, GRID - done)]]
                done, nfe = done + len(images), nfe + evaluations
        except SolverError as error:
            if config.give_up == "fail":
                raise
            failed, nfe, shown = str(error), math.nan, [np.zeros((min(GRID, shape[0]), *shape[1:]), np.uint8)]
            file.truncate(first)
            file.truncate(first + math.prod(shape))  # black
        file.flush()
        digest = sha256(part)
    seconds = time.perf_counter() - start
    batches = math.ceil(config.count / config.batch)
    tol = config.tol if config.solver == "rk45" else None
    info = SampleInfo(config.count, config.solver, tol, nfe / batches, config.temperature, seconds)
    save_grid(np.concatenate(shown), args.out / "grid.png")
    facts = {
        "device": checkpoint.device_name(model.device),
        "code": stage.code,
        "model": checkpoint.read_config(args.model).sha256,
        "samples_sha256": digest,
    }
    if failed is not None:
        facts["failed"] = failed
    write_json(args.out / "sampling.json", seal({**asdict(info), **facts}))
    if failed is not None:
        return f"given up: {failed}"
    return f"{info.images} images, NFE {info.nfe:.0f}, {info.images / info.seconds:.0f} img/s"


def nelbo(args: argparse.Namespace) -> None:
    from lsgm.evaluation import likelihood

    stage = load_stage(NELBOStage, args.config)
    where = device(args.device)
    likelihood.make_part(stage, args.data, args.model, args.vae, args.out, where, args.part, args.parts, args.state)


def evaluate(args: argparse.Namespace) -> None:
    from lsgm.data.store import ImageStore
    from lsgm.evaluation import evaluate as evaluation
    from lsgm.evaluation.figures import save_panels
    from lsgm.evaluation.history import read_history

    stage = load_stage(EvaluateStage, args.config)
    for folder in (args.vae, args.model):  # copied in the end
        read_history(folder / "history.csv", "restore it, or train the model again")
    metrics = evaluation.evaluate(
        stage,
        *(args.data, args.model, args.samples, args.vae, args.vae_samples),
        *(args.nelbo, args.statistics, device(args.device)),
    )
    panels = {
        f"{stage.dataset}, test set": ImageStore(args.data).images("test")[:64],
        "VAE, prior N(0, I)": evaluation.read_samples(args.vae_samples)[:64],
        "LSGM": evaluation.read_samples(args.samples)[:64],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    save_panels(panels, args.out / "samples.png")
    copy(args.vae / "history.csv", args.out / "history_vae.csv")
    copy(args.model / "history.csv", args.out / "history_lsgm.csv")
    write_json(args.out / "metrics.json", metrics)


def illustrate(args: argparse.Namespace) -> None:
    from lsgm.evaluation.illustrate import illustrate as run

    run(load_stage(IllustrateStage, args.config), args.data, args.model, args.out, device(args.device))


def tabulate(args: argparse.Namespace) -> None:
    from lsgm.evaluation import ablations, tables

    stage = load_stage(TabulateStage, args.config) if args.config else None
    if stage is not None and stage.cells:
        ablations.tabulate(stage, args.results, args.out)
    else:
        tables.tabulate(args.results, args.out)


def verify(args: argparse.Namespace) -> None:
    from lsgm import checkpoint
    from lsgm.data.store import MANIFEST, ImageStore

    models = folders(args.folder, "config.json", "model.safetensors")
    stores = folders(args.folder, MANIFEST, "*_images.npy")
    if not models and not stores:
        raise LSGMError(f"{args.folder}: holds no model and no dataset; expected a folder of theirs, or one of them")
    for store in stores:
        ImageStore(store).verify()
    for folder in models:
        checkpoint.verify_history(folder)
    unchecked = [f"{folder}/{name}" for folder in models for name in checkpoint.verify(folder).unchecked]
    counts = [f"{len(found)} {what}" for found, what in ((models, "models"), (stores, "datasets")) if found]
    log.info(f"{args.folder}: {' and '.join(counts)} are what was saved")
    if unchecked:
        log.warning(f"{', '.join(unchecked)}: cannot be checked, saved before their sha256 was recorded")


def folders(root: Path, *patterns: str) -> list[Path]:
    """The folders below ``root`` that hold such files, without hidden ones: those of preparations that go on."""
    found = {path.parent for pattern in patterns for path in root.rglob(pattern)}
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))


def import_published(args: argparse.Namespace) -> None:
    from lsgm import checkpoint, published

    model = published.load(args.file)
    checkpoint.save(model, args.out, stages=[], summary={"imported_from": args.file.name})
    log.info(f"{args.out}: {'LSGM' if model.prior is not None else 'VAE'}, latents {list(model.latent_shape)}")


def export_published(args: argparse.Namespace) -> None:
    from lsgm import checkpoint, published

    dataset = args.dataset
    if dataset is None:
        found = [stage["dataset"] for stage in checkpoint.stages(args.model)]
        if not found:
            raise LSGMError(f"{args.model}: does not say what it was trained on; name it: --dataset cifar10")
        dataset = found[-1]
    published.export(checkpoint.load(args.model), args.out, str(dataset))
    log.info(f"{args.out}: written")


def describe(args: argparse.Namespace) -> None:
    from lsgm import checkpoint
    from lsgm.data.registry import dataset
    from lsgm.describe import describe as run
    from lsgm.params import load_params

    if Path(args.model).is_dir():
        config = checkpoint.read_config(args.model)
        print(run(config.image, config.vae, config.prior, config.sde))
        return
    params = load_params("params.yaml")
    if args.model not in params.everything:
        raise LSGMError(f"{args.model}: neither a model's folder nor one of params.yaml: {', '.join(params.models)}")
    model = params.everything[args.model]
    image = dataset(model.dataset, params.datasets[model.dataset]).image
    print(run(image, params.vae(args.model), model.prior, model.sde, model.train.train_vae))


def device(name: str) -> torch.device:
    """The device that ``name`` stands for; `auto` is the GPU where there is one."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise LSGMError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let the allocator of the C library keep what is freed: feature maps come and go in every step, and fresh pages
    have to be asked of the system and filled with zeros each time."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold, unlimited = -1, -3, 2**31 - 1
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, unlimited)
    except OSError:  # another C library: nothing to tune
        pass


def used(name: str) -> str:
    """The device and the most memory that this process held, where it used PyTorch."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = f"peak memory {peak / 2**30:.1f} GB"
    if "torch" not in sys.modules:
        return f"; {memory}"
    import torch

    from lsgm.checkpoint import device_name

    where = device(name)
    if where.type == "cuda":
        memory += f", on the GPU {torch.cuda.max_memory_allocated(where) / 2**30:.1f} GB"
    return f" on {device_name(where)}; {memory}"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="lsgm", description="Score-based generative modeling in latent space.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str, *paths: tuple[str, str]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        for option, what in paths:
            sub.add_argument(option, type=Path, required=True, help=what)
        sub.add_argument("--log", type=Path, help="also write what is said to this file")
        sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
        sub.set_defaults(run=run)
        return sub

    config = ("--config", "frozen configuration of the job (JSON; the workflow writes it from params.yaml)")
    data = ("--data", "folder that `lsgm prepare` wrote")
    vae = ("--vae", "folder of the VAE: what `lsgm pretrain` wrote; `lsgm train` takes that of an LSGM too")
    command(
        "prepare", prepare, "Get a dataset and write it as an array store.", config, ("--out", "folder of the store")
    )
    command(
        "statistics",
        statistics,
        "Statistics of a dataset's training images, that samples are compared with.",
        *(config, data, ("--out", "file")),
    )
    first = command("pretrain", pretrain, "Train the VAE with the prior N(0, I).", config, data, ("--out", "folder"))
    second = command("train", train, "Train VAE and score prior end to end.", config, data, vae, ("--out", "folder"))
    for sub in (first, second):
        sub.add_argument("--tensorboard", type=Path, help="folder for TensorBoard events")
        sub.add_argument("--state", type=Path, help="folder for what an interrupted training goes on from; OUT/state")
    model = ("--model", "folder of a model")
    command("sample", sample, "Draw images from a model.", config, model, ("--out", "folder"))
    bound = command(
        "nelbo", nelbo, "NELBO of test images, of an LSGM and of its VAE.", config, data, model, vae, ("--out", "file")
    )
    bound.add_argument("--part", type=int, default=0, help="which of the parts (0, 1 ...) that share the images")
    bound.add_argument("--parts", type=int, default=1, help="how many there are")
    bound.add_argument("--state", type=Path, help="file that an interrupted job goes on from; OUT.state")
    judge = command(
        "evaluate",
        evaluate,
        "NELBO and fidelity of an LSGM and of its VAE.",
        *(config, data, model, ("--samples", "folder that `lsgm sample` wrote for the model"), vae),
        *(("--vae-samples", "the same for the VAE"), ("--out", "folder of the results")),
    )
    judge.add_argument("--nelbo", type=Path, nargs="+", required=True, help="all parts that `lsgm nelbo` wrote")
    judge.add_argument("--statistics", type=Path, nargs="*", default=[], help="what `lsgm statistics` wrote")
    command(
        "illustrate",
        illustrate,
        "Figures of an LSGM: reconstructions, interpolations, samples along the ODE, mixing coefficients.",
        *(config, data, model, ("--out", "folder")),
    )
    bring = command("import-published", import_published, "Turn a checkpoint of the authors' release into a model.",
                    ("--out", "folder"))  # fmt: skip
    bring.add_argument("file", type=Path, help="the published file, of the VAE or of the LSGM")
    write = command("export-published", export_published, "Write a model as the authors' code reads it.", model,
                    ("--out", "file"))  # fmt: skip
    write.add_argument("--dataset", help="their name of the dataset; the one that the model was trained on")
    about = command("describe", describe, "Layers, parameters, latents, FLOPs and memory of a model.")
    about.add_argument("model", help="a model of params.yaml, or the folder of one")
    check = command("verify", verify, "Check that models and prepared datasets are those that were saved.")
    check.add_argument("folder", type=Path, help="the folder of one, or one that holds such, as checkpoints/ or data/")
    tables = command("tabulate", tabulate, "Tables and figures of evaluated models.", ("--out", "folder"))
    tables.add_argument("--results", type=Path, nargs="+", required=True, help="folders that `lsgm evaluate` wrote")
    tables.add_argument("--config", type=Path, help="frozen configuration: of an ablation, the table of its cells")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 on success, 1 on an error that the user can mend (2: wrong arguments), 75: stopped, go on."""
    args = parser().parse_args(argv)
    handler = signal.getsignal(signal.SIGTERM)
    on_main_thread = threading.current_thread() is threading.main_thread()
    if on_main_thread:  # unwind, so that temporary files are removed; a training saves its state first
        signal.signal(signal.SIGTERM, _terminate)
    try:
        state = getattr(args, "state", None)
        goes_on = state is not None and state.exists()
        set_up_logging(args.log, quiet=os.environ.get("RANK", "0") != "0", goes_on=goes_on)
        keep_freed_memory()
        start = time.monotonic()
        said = args.run(args)
        if args.command in STAGES:
            log.info(
                f"lsgm {args.command}: done in {clock(time.monotonic() - start)}{used(args.device)}"
                f"{f'; {said}' if said else ''}"
            )
    except Stopped as stopped:
        log.info(f"lsgm {args.command}: {stopped}")
        return 75
    except LSGMError as error:
        log.error(f"lsgm {args.command}: error: {error}")
        return 1
    except (MemoryError, RuntimeError) as error:  # PyTorch's are RuntimeErrors
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        log.error(
            f"lsgm {args.command}: error: out of memory ({' '.join(str(error).split())[:150]}); a smaller batch, or "
            "accumulate and recompute of a training, need less"
        )
        return 1
    except BrokenPipeError:  # nobody reads what is printed, as in `lsgm describe NAME | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
        return 141
    except OSError as error:
        place = error.filename or error.filename2
        log.error(f"lsgm {args.command}: error: {f'{place}: {error.strerror}' if place else error}")
        return 1
    except KeyboardInterrupt:
        log.error(f"lsgm {args.command}: interrupted")
        return 130
    except Terminated:
        log.error(f"lsgm {args.command}: terminated")
        return 143
    finally:
        if on_main_thread:
            signal.signal(signal.SIGTERM, handler)
    return 0


class Terminated(BaseException):
    """SIGTERM arrived where nothing is saved on the way out."""


def _terminate(number: int, frame: object) -> None:
    raise Terminated


if __name__ == "__main__":
    sys.exit(main())
