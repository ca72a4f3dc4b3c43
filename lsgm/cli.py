"""The command line: one subcommand per stage of the pipeline."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from lsgm.config.mistakes import parse
from lsgm.config.stages import (
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
from lsgm.errors import LSGMError, Stopped
from lsgm.progress import clock, log, set_up_logging
from lsgm.runtime import device, keep_freed_memory, limit_spinning, usage

SAMPLE_OPTIONS = ("count", "solver", "steps", "seed", "batch")
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|bad_alloc", re.IGNORECASE)

# Importing torch takes seconds, so each command imports only what it needs and `lsgm --help` responds at once.


def prepare(args: argparse.Namespace) -> None:
    from lsgm.data import prepare

    prepare.prepare(load_stage(PrepareStage, args.config), args.out)


def statistics(args: argparse.Namespace) -> None:
    from lsgm.evaluation import statistics

    statistics.make_reference(load_stage(StatisticsStage, args.config), args.data, args.out, device(args.device))


def pretrain(args: argparse.Namespace) -> str:
    from lsgm.training.pretrain import pretrain as run

    stage = load_stage(PretrainStage, args.config)
    return str(run(stage, args.data, args.out, device(args.device), args.tensorboard, args.resume))


def train(args: argparse.Namespace) -> str:
    from lsgm.training.train import train as run

    stage = load_stage(TrainStage, args.config)
    return str(run(stage, args.data, args.vae, args.out, device(args.device), args.tensorboard, args.resume))


def sample(args: argparse.Namespace) -> str | None:
    from lsgm.evaluation.generate import draw_part, generate

    given = {key: getattr(args, key) for key in SAMPLE_OPTIONS if getattr(args, key) is not None}
    if args.config is not None:
        stage = load_stage(SampleStage, args.config)
        if given:
            stage = parse(
                SampleStage, {**stage.model_dump(), "sample": {**stage.sample.model_dump(), **given}}, "options"
            )
    else:
        stage = parse(SampleStage, {"model": "model", "sample": {"count": 64, **given}}, "options")
    where = device(args.device)
    if args.part is not None:
        draw_part(stage, args.model, args.resume or args.out / "resume", where, args.part, args.parts)
        return None
    found = generate(stage, args.model, args.out, where, args.resume)
    if found.failed is not None:
        return f"given up: {found.failed}"
    return f"{found.images} images, NFE {found.nfe:.0f}, {found.images / found.seconds:.0f} img/s"


def nelbo(args: argparse.Namespace) -> None:
    from lsgm.evaluation.nelbo import make_part

    stage = load_stage(NELBOStage, args.config)
    where = device(args.device)
    make_part(stage, args.data, args.model, args.vae, args.out, where, args.part, args.parts, args.resume)


def evaluate(args: argparse.Namespace) -> None:
    from lsgm.evaluation.evaluate import Inputs, write_results

    inputs = Inputs(args.data, args.model, args.samples, args.vae, args.vae_samples, args.nelbo, args.statistics)
    write_results(load_stage(EvaluateStage, args.config), inputs, args.out, device(args.device))


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
    from lsgm.verify import verify as run

    run(args.folder)


def import_published(args: argparse.Namespace) -> None:
    from lsgm.convert import import_published as run

    run(args.file, args.out)


def export_published(args: argparse.Namespace) -> None:
    from lsgm.convert import export_published as run

    run(args.model, args.out, args.dataset)


def describe(args: argparse.Namespace) -> None:
    from lsgm.describe import describe_model, settings

    print(settings(args.model).rstrip() if args.config else describe_model(args.model))


CONFIG = ("--config", "frozen configuration of the job (JSON; the workflow writes it from params.yaml)")
DATA = ("--data", "folder that `lsgm prepare` wrote")
VAE = ("--vae", "folder of the VAE: what `lsgm pretrain` wrote; `lsgm train` takes that of an LSGM too")
MODEL = ("--model", "folder of a model")


class Commands:
    """The sub-commands, added one by one."""

    def __init__(self) -> None:
        self.top = argparse.ArgumentParser(prog="lsgm", description="Score-based generative modeling in latent space.")
        self._commands = self.top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(self, name: str, run: object, text: str, *paths: tuple[str, str]) -> argparse.ArgumentParser:
        """A sub-command with an option for each of the ``paths`` that it needs."""
        sub = self._commands.add_parser(name, help=text, description=text)
        for option, what in paths:
            sub.add_argument(option, type=Path, required=True, help=what)
        sub.add_argument("--log", type=Path, help="also write log lines to this file")
        sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
        sub.set_defaults(run=run)
        return sub


def parser() -> argparse.ArgumentParser:
    commands = Commands()
    _add_training(commands)
    _add_evaluation(commands)
    _add_tools(commands)
    return commands.top


def _add_training(commands: Commands) -> None:
    store, file, folder = (("--out", what) for what in ("folder of the store", "file", "folder"))
    commands.add("prepare", prepare, "Get a dataset and write it as an array store.", CONFIG, store)
    commands.add(
        "statistics", statistics, "Compute statistics of the training images that samples are compared with.",
        CONFIG, DATA, file,
    )  # fmt: skip
    first = commands.add("pretrain", pretrain, "Train the VAE with the prior N(0, I).", CONFIG, DATA, folder)
    second = commands.add("train", train, "Train VAE and score prior end to end.", CONFIG, DATA, VAE, folder)
    for sub in (first, second):
        sub.add_argument("--tensorboard", type=Path, help="folder for TensorBoard events")
        sub.add_argument("--resume", type=Path, help="folder that an interrupted training resumes from; OUT/resume")


def _add_evaluation(commands: Commands) -> None:
    draw = commands.add("sample", sample, "Draw images from a model.", MODEL, ("--out", "folder"))
    draw.add_argument("--config", type=Path, help=f"{CONFIG[1]}; the options below replace what it says")
    draw.add_argument("--count", type=int, help="number of images; 64")
    draw.add_argument("--solver", help="ab (the default), ddim, dpmpp_2m, heun, rk45, ancestral ...")
    draw.add_argument("--steps", type=int, help="evaluations of the score network; 10")
    draw.add_argument("--seed", type=int, help="1")
    draw.add_argument("--batch", type=int, help="images at a time; 128")
    draw.add_argument("--part", type=int, help="only draw the images of this part (0, 1 ...), and leave them in RESUME")
    draw.add_argument("--parts", type=int, default=1, help="number of parts that share the images")
    draw.add_argument("--resume", type=Path, help="folder of the images that are drawn already; OUT/resume")
    bound = commands.add(
        "nelbo", nelbo, "NELBO of test images, of an LSGM and of its VAE.", CONFIG, DATA, MODEL, VAE, ("--out", "file")
    )
    bound.add_argument("--part", type=int, default=0, help="number of this part of the images (0, 1 ...)")
    bound.add_argument("--parts", type=int, default=1, help="number of parts that share the images")
    bound.add_argument("--resume", type=Path, help="file that an interrupted job resumes from; OUT.resume")
    judge = commands.add(
        "evaluate",
        evaluate,
        "NELBO and fidelity of an LSGM and of its VAE.",
        *(CONFIG, DATA, MODEL, ("--samples", "folder that `lsgm sample` wrote for the model"), VAE),
        *(("--vae-samples", "folder that `lsgm sample` wrote for the VAE"), ("--out", "folder of the results")),
    )
    judge.add_argument("--nelbo", type=Path, nargs="+", required=True, help="all parts that `lsgm nelbo` wrote")
    judge.add_argument("--statistics", type=Path, nargs="*", default=[], help="files that `lsgm statistics` wrote")
    commands.add(
        "illustrate",
        illustrate,
        "Figures of an LSGM: reconstructions, interpolations, samples along the ODE, mixing coefficients.",
        *(CONFIG, DATA, MODEL, ("--out", "folder")),
    )
    tables = commands.add("tabulate", tabulate, "Tables and figures of evaluated models.", ("--out", "folder"))
    tables.add_argument("--results", type=Path, nargs="+", required=True, help="folders that `lsgm evaluate` wrote")
    tables.add_argument("--config", type=Path, help="frozen configuration of an ablation, for the table of its cells")


def _add_tools(commands: Commands) -> None:
    bring = commands.add(
        "import-published", import_published, "Turn a checkpoint of the authors' release into a model.",
        ("--out", "folder"),
    )  # fmt: skip
    bring.add_argument("file", type=Path, help="the published file, of the VAE or of the LSGM")
    write = commands.add(
        "export-published", export_published, "Write a model as the authors' code reads it.", MODEL, ("--out", "file")
    )
    write.add_argument("--dataset", help="their name of the dataset; by default the one that the model was trained on")
    about = commands.add("describe", describe, "Print layers, parameters, latents, FLOPs and memory of a model.")
    about.add_argument("model", help="a model of params.yaml, or the folder of one")
    about.add_argument("--config", action="store_true", help="print its settings instead, with all that it inherits")
    check = commands.add("verify", verify, "Check that models and prepared datasets are as they were saved.")
    check.add_argument("folder", type=Path, help="a model, a dataset, or a folder of them, as checkpoints/ or data/")


def main(argv: list[str] | None = None) -> int:
    """Run one command: 0 on success, 1 on a user's error, 2 on wrong arguments, 75 if stopped and resumable."""
    limit_spinning()
    args = parser().parse_args(argv)
    handler = signal.getsignal(signal.SIGTERM)
    on_main_thread = threading.current_thread() is threading.main_thread()
    if on_main_thread:  # unwind to remove temporary files; training saves its state first
        signal.signal(signal.SIGTERM, _terminate)
    try:
        state = getattr(args, "resume", None)
        goes_on = state is not None and state.exists()
        set_up_logging(args.log, quiet=os.environ.get("RANK", "0") != "0", goes_on=goes_on)
        keep_freed_memory()
        start = time.monotonic()
        said = args.run(args)
        if args.command in STAGES:
            log.info(
                f"lsgm {args.command}: done in {clock(time.monotonic() - start)}{usage(args.device)}"
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
            f"lsgm {args.command}: error: out of memory ({' '.join(str(error).split())[:150]}); reduce the batch, or "
            "in training set accumulate or activation_checkpointing"
        )
        return 1
    except BrokenPipeError:  # the reader of stdout has exited, as in `lsgm describe NAME | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python reports an error at exit
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
    """Raised by SIGTERM in commands that have no state to save."""


def _terminate(number: int, frame: object) -> None:
    raise Terminated


if __name__ == "__main__":
    sys.exit(main())
