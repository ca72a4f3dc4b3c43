import csv
import itertools
import math
import resource

import numpy as np
import pytest
import torch

from lsgm.config import ScheduleConfig
from lsgm.data.batches import Batches
from lsgm.errors import LSGMError, Stopped
from lsgm.training.distributed import Ranks
from lsgm.training.ema import EMA
from lsgm.training.engine import Engine
from lsgm.training.history import History
from lsgm.training.objective import Objective
from lsgm.training.schedule import Schedule
from lsgm.training.state import States
from lsgm.training.step import OptimizerSpec, Task

CPU = torch.device("cpu")


def schedule(**settings):
    return Schedule(ScheduleConfig(**{"epochs": 2, "batch": 8, "warmup_epochs": 0.5} | settings), 8)


def test_iteration_schedule_warms_up_and_ends_at_the_minimum():
    s = schedule(lr_schedule="iteration")
    rates = [s.learning_rate(i, 1.0, 0.1) for i in range(s.steps)]
    assert s.steps == 16 and rates[:4] == [0.0, 0.25, 0.5, 0.75]
    assert rates[4] == 0.75 and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_no_warm_up_starts_at_the_full_rate():
    assert schedule(warmup_epochs=0).learning_rate(0, 1.0, 0.1) == 1.0


class Quadratic:
    """A training one can follow: minimize |w - the batch's mean|^2 with noise of its own; faults at chosen steps."""

    def __init__(self, out, faults=(), every=4, world=1, stream=False, **settings):
        torch.manual_seed(0)
        self.config = ScheduleConfig(**{"epochs": 2, "batch": 8, "warmup_epochs": 0} | settings)
        self.norm, self.w = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
        self.net = torch.nn.Sequential(self.norm, self.w)
        self.drop = torch.nn.Dropout(0.3)
        optimizer = torch.optim.AdamW(self.w.parameters(), lr=0.1)
        self.faults, self.calls, self.stop_at = dict(faults), [], None
        self.ema = EMA(self.w, 0.9)
        task = Task(
            optimized=[OptimizerSpec("w", optimizer, 0.1, 0.01)],
            objective=self.objective,
            regularizers=[(0.1, lambda: 1 + 0 * self.w.weight.sum())],
            after_step=self.ema.update,
            parts={"net": self.net, "ema": self.ema},
            networks={"net": self.net},
            summarize=lambda vectors: {},
            validate=self.look,
        )
        images = np.random.default_rng(0).integers(0, 256, (64, 1, 28, 28), dtype=np.uint8)
        batches = Batches(images, self.config.batch, CPU, self.config.seed, stream=stream)
        self.history = History(every)
        self.engine = Engine("toy", task, batches, self.config, self.history, States(out, {"toy": 1}), Ranks(), CPU)

    def look(self):
        torch.rand(7)  # what a look draws is nobody's business
        return {"test_nelbo": float(self.engine.step)}, {}

    def objective(self, x, step, steps, random):
        self.calls.append(step)
        if step == self.stop_at:
            self.engine.stop = True
        fault = self.faults.get(step, 1.0)
        features = random.normal((4,)) + x.mean(dim=(1, 2, 3))[:, None]
        loss = (
            (self.w(self.drop(self.norm(features if math.isfinite(fault) else features * fault))) - 1).square().mean()
        )
        loss = loss * (fault if math.isfinite(fault) else 1)
        return Objective(loss, {"nelbo": loss.detach(), "reconstruction": loss.detach()})

    def result(self):
        tensors = (*self.net.state_dict().values(), *self.ema.module.parameters())
        return [t.detach().clone() for t in tensors], self.history.rows


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one[0], two[0], strict=True)) and one[1] == two[1]


def test_every_step_is_done_once_and_rows_are_means(tmp_path):
    toy = Quadratic(tmp_path / "a")
    summary = toy.engine.fit()
    assert toy.calls == list(range(16)) and summary.steps == 16 and summary.skipped == summary.restarts == 0
    rates = [row["lr_w"] for row in toy.history.rows]
    assert [row["step"] for row in toy.history.rows] == [4, 8, 12, 16] and rates[0] == 0.1 and rates[-1] < 0.1
    toy.history.write(tmp_path / "history.csv")
    rows = list(csv.DictReader((tmp_path / "history.csv").read_text().splitlines()))
    assert float(rows[-1]["epoch"]) == 2.0 and float(rows[0]["loss"]) > 0


@pytest.mark.parametrize("stops", [[1], [5, 6], [3, 9, 15]])
def test_what_goes_on_ends_where_it_would_have(tmp_path, stops):
    """Stopped (as by SIGTERM) and started anew in another object: weights, average and history, bit by bit."""
    whole = Quadratic(tmp_path / "whole")
    whole.engine.fit()
    for stop in stops:
        part = Quadratic(tmp_path / "parts")
        part.stop_at = stop
        with pytest.raises(Stopped, match=f"told to stop after step {stop + 1}; the same command resumes"):
            part.engine.fit()
    last = Quadratic(tmp_path / "parts")
    last.engine.fit()
    assert last.calls == list(range(stops[-1] + 1, 16))
    assert same(whole.result(), last.result())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_set_that_streams_trains_the_same(tmp_path, accumulate):
    """With an interruption in the middle of an epoch."""
    whole = Quadratic(tmp_path / "whole", accumulate=accumulate)
    whole.engine.fit()
    part = Quadratic(tmp_path / "parts", stream=True, accumulate=accumulate)
    part.stop_at = 5
    with pytest.raises(Stopped):
        part.engine.fit()
    last = Quadratic(tmp_path / "parts", stream=True, accumulate=accumulate)
    last.engine.fit()
    assert same(whole.result(), last.result())


def test_looks_disturb_nothing_and_are_in_the_history(tmp_path):
    """Every half epoch at rows of every 4 steps."""
    without, looking = Quadratic(tmp_path / "a"), Quadratic(tmp_path / "b", eval_every_epochs=0.5)
    for toy in (without, looking):
        toy.engine.fit()
    assert [row.pop("test_nelbo", None) for row in looking.history.rows] == [4, 8, 12, 16]
    assert same(without.result(), looking.result())


@pytest.mark.parametrize("fault", [float("nan"), float("inf"), 1e9])
def test_a_bad_step_is_left_out(tmp_path, fault, caplog):
    """The weights are those before it: NaN, infinite, or exploding beyond the last hundred norms."""
    toy = Quadratic(tmp_path, faults={40: fault}, epochs=6)
    summary = toy.engine.fit()
    assert summary.skipped == 1 and summary.restarts == 0
    assert all(torch.isfinite(p).all() and p.abs().max() < 100 for p in toy.result()[0])
    assert toy.history.rows[-1]["skipped"] == 1


def test_after_several_bad_steps_it_goes_back_more_careful(tmp_path):
    rescue = {"skip_limit": 3, "max_restarts": 2, "lr_factor": 0.5, "spectral_factor": 2}
    toy = Quadratic(tmp_path, epochs=6, divergence=rescue, checkpoint_minutes=1e-9)
    bad = [float("nan")] * 3
    toy.faults = {30: bad[0], 31: bad[1], 32: bad[2]}
    original = toy.objective

    def once(x, step, steps, random):
        value = original(x, step, steps, random)
        if step == 32:
            toy.faults.clear()  # it was the weights' fault: the next time it goes well
        return value

    toy.engine.task.objective = once
    summary = toy.engine.fit()
    assert summary.restarts == 1 and summary.skipped == 3 and summary.steps == 48
    assert toy.calls == [*range(33), *range(30, 48)]
    assert toy.history.rows[-1]["restarts"] == 1
    undisturbed = Schedule(toy.config, 8).learning_rate(47, 0.1, 0.01)
    assert toy.history.rows[-1]["lr_w"] == pytest.approx(0.5 * undisturbed)
    assert toy.history.rows[-1]["spectral"] == pytest.approx(2 * 0.1)


def test_what_ended_badly_once_is_begun_from_further_back(tmp_path):
    """The weights of the last state are the fault: every step from 30 on fails, until it goes back to before 25."""
    toy = Quadratic(
        tmp_path,
        epochs=6,
        divergence={"skip_limit": 2, "max_restarts": 2},
        faults=dict.fromkeys(range(30, 48), math.nan),
    )
    original = toy.objective

    def objective(x, step, steps, random):
        if step in (25, 30) and step not in toy.calls:
            toy.engine._save()
        if step == 25 and toy.calls.count(25):
            toy.faults.clear()
        return original(x, step, steps, random)

    toy.engine.task.objective = objective
    summary = toy.engine.fit()
    assert summary.restarts == 2 and toy.calls == [*range(32), 30, 31, *range(25, 48)]


def test_it_gives_up_with_a_diagnosis(tmp_path):
    rescue = {"skip_limit": 2, "max_restarts": 1}
    toy = Quadratic(tmp_path, faults={s: float("nan") for s in range(20, 30)}, epochs=6, divergence=rescue)
    message = (
        r"toy: diverged at step .* after 1 restarts .*not finite: .*reconstruction.*largest in net\.0\.weight: nan"
    )
    with pytest.raises(LSGMError, match=message):
        toy.engine.fit()


def test_what_gives_up_is_recorded_where_that_is_asked_for(tmp_path):
    """The last good state is what is left; the history and the summary say where it diverged."""
    rescue = {"skip_limit": 2, "max_restarts": 1, "on_failure": "keep_last"}
    toy = Quadratic(tmp_path, faults=dict.fromkeys(range(20, 30), math.nan), epochs=6, divergence=rescue)
    good = {}
    original = toy.objective

    def objective(x, step, steps, random):
        if step == 10 and 10 not in toy.calls:
            toy.engine._save()
            good["w"] = toy.w.weight.detach().clone()
        return original(x, step, steps, random)

    toy.engine.task.objective = objective
    summary = toy.engine.fit()
    assert (summary.steps, summary.diverged_at, summary.restarts, summary.skipped) == (10, 22, 1, 4)
    assert torch.equal(toy.w.weight, good["w"])
    *before, last = toy.history.rows
    assert max(row["step"] for row in before) == 20  # the way there, beyond the state that is kept
    assert last["step"] == 22 and math.isnan(last["nelbo"]) and last["skipped"] == 4
    assert "diverged at step 22" in str(summary)


def at_the_end(toy, what):
    """Call ``what`` in every last step, after its gradients."""
    is_good = toy.engine.guard.is_good

    def disturbed(loss, norm):
        found = loss, norm
        return is_good(*(what(found) or found if toy.engine.step == toy.engine.schedule.steps - 1 else found))

    toy.engine.guard.is_good = disturbed


FAULTS = {
    "a gradient": lambda toy: lambda found: (found[0], found[1] * math.nan),
    "a loss": lambda toy: lambda found: (math.inf, found[1]),
    "a running variance": lambda toy: lambda _: toy.norm.running_var[1].fill_(math.inf) and None,
    "a weight": lambda toy: lambda _: toy.w.weight.data[0, 1].fill_(math.nan) and None,
    "an average": lambda toy: lambda _: toy.ema.average[0].data[0, 1].fill_(math.nan) and None,
    "a moment": lambda toy: lambda _: first_moment(toy).fill_(math.nan) and None,
}


def first_moment(toy):
    return toy.engine.task.optimized[0].optimizer.state[toy.w.bias]["exp_avg"]


def all_finite(toy):
    tensors = [*toy.result()[0], first_moment(toy)]
    return all(t.isfinite().all() for t in tensors)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_training_that_ends_badly_once_is_done_again_from_its_last_state(tmp_path, fault):
    """The last step is skipped, or something is not finite after it."""
    toy = Quadratic(tmp_path)
    spoil = FAULTS[fault](toy)
    at_the_end(toy, lambda found: None if toy.engine.guard.restarts else spoil(found))
    summary = toy.engine.fit()
    assert toy.calls == [*range(16), *range(16)] and all_finite(toy)
    assert (summary.steps, summary.restarts, summary.diverged_at) == (16, 1, None)
    assert summary.skipped == (fault in ("a gradient", "a loss"))
    undisturbed = Schedule(toy.config, 8).learning_rate(15, 0.1, 0.01)
    assert toy.history.rows[-1]["lr_w"] == pytest.approx(0.5 * undisturbed)
    assert [row["step"] for row in toy.history.rows] == [4, 8, 12, 16]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_training_that_always_ends_badly_diverged(tmp_path, fault):
    rescue = {"max_restarts": 1}
    toy = Quadratic(tmp_path / "fail", divergence=rescue)
    at_the_end(toy, FAULTS[fault](toy))
    message = "its last step was skipped" if fault in ("a gradient", "a loss") else "not finite: "
    with pytest.raises(LSGMError, match=rf"toy: diverged at step 16, after 1 restarts .*\({message}"):
        toy.engine.fit()
    toy = Quadratic(tmp_path / "record", divergence={**rescue, "on_failure": "keep_last"})
    at_the_end(toy, FAULTS[fault](toy))
    start = [t.clone() for t in toy.result()[0]]
    summary = toy.engine.fit()
    assert (summary.steps, summary.restarts, summary.diverged_at) == (0, 1, 16)
    assert all(torch.equal(a, b) for a, b in zip(toy.result()[0], start, strict=True))
    assert math.isnan(toy.history.rows[-1]["nelbo"])


def test_a_single_step_can_end_badly(tmp_path):
    toy = Quadratic(tmp_path, epochs=1 / 8, faults={0: math.nan}, divergence={"max_restarts": 1})
    with pytest.raises(LSGMError, match="toy: diverged at step 1, after 1 restarts"):
        toy.engine.fit()


def test_a_state_that_is_not_finite_is_not_saved(tmp_path, caplog):
    """Statistics that go wrong in a step with a good loss: noticed when the next state would be saved."""
    toy = Quadratic(tmp_path, checkpoint_minutes=1e-9)
    original, saved = toy.objective, []

    def objective(x, step, steps, random):
        value = original(x, step, steps, random)
        if step == 6 and toy.calls.count(6) == 1:
            toy.norm.running_var.data[0] = math.inf
        return value

    save = toy.engine.states.save
    toy.engine.states.save = lambda step, state: (saved.append(state["parts"]["net"]["0.running_var"].clone()),
                                                  save(step, state))  # fmt: skip
    toy.engine.task.objective = objective
    with caplog.at_level("INFO", logger="lsgm"):
        summary = toy.engine.fit()
    assert "toy: state not saved after step 7: not finite: parts.net.0.running_var" in caplog.text
    assert toy.calls == [*range(8), *range(6, 16)] and summary.restarts == 1 and summary.skipped == 0
    assert all(v.isfinite().all() for v in saved) and all_finite(toy)


def test_weights_that_are_not_finite_from_the_start_have_no_state_to_go_back_to(tmp_path):
    toy = Quadratic(tmp_path)
    toy.norm.running_mean[0] = math.nan
    with pytest.raises(LSGMError, match="not finite: parts.net.0.running_mean.* there is no state to go back to"):
        toy.engine.fit()


def test_a_training_resumed_after_its_last_step_is_looked_at_too(tmp_path):
    """Stopped during its last step, which was skipped: the resumed run does not count this as success either."""
    first = Quadratic(tmp_path, faults={15: math.nan})
    first.stop_at = 15
    with pytest.raises(Stopped, match="told to stop after step 16"):
        first.engine.fit()
    second = Quadratic(tmp_path)
    summary = second.engine.fit()
    assert second.calls == list(range(16)) and (summary.restarts, summary.skipped) == (1, 1)


@pytest.mark.parametrize("scale", [64.0, 1.0])
def test_a_last_step_left_out_by_the_loss_scale(tmp_path, scale):
    """While fp16 looks for its scale, steps that are left out are no divergence."""
    toy = Quadratic(tmp_path, faults={15: math.nan}, divergence={"max_restarts": 0})
    toy.engine.take_step.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
    if scale > 1:
        assert toy.engine.fit().skipped == 1
    else:
        with pytest.raises(LSGMError, match="diverged at step 16"):
            toy.engine.fit()


def test_parts_of_a_batch_add_up_to_it(tmp_path):
    """Dropout and the statistics of batch norm apart, which this has none of."""
    one, four = (Quadratic(tmp_path / str(n), accumulate=n) for n in (1, 4))
    for toy in (one, four):
        toy.drop = torch.nn.Identity()
        toy.norm.eval()
        toy.engine.fit()
    for a, b in zip(one.result()[0], four.result()[0], strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(LSGMError, match="batch: 8 images cannot be divided evenly among 1 processes with 3 parts each"):
        Quadratic(tmp_path / "x", accumulate=3)


def test_tensorboard_events_are_written(tmp_path):
    history = History(every=1, tensorboard=tmp_path)
    history.begin(0)
    for factor in (0.5, 1.5):
        history.add({"loss": factor * torch.tensor(2.0), "kl": factor * torch.tensor([1.0, 3.0])})
    scalars, vectors = history.close_row()
    assert scalars == {"loss": 2.0} and vectors == {"kl": [1.0, 3.0]}
    history.add_row({"step": 1, **scalars})
    history.add_images("samples", torch.rand(4, 1, 8, 8), 1)
    history.write(tmp_path / "history.csv")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Scalars("loss")[0].value == 2.0 and len(events.Images("samples")) == 1


def test_a_full_disk_names_the_folder_of_the_events(tmp_path, capfd):
    """A limit on the size of files in the place of a full disk; TensorBoard writes in a thread of its own."""
    history = History(every=1, tensorboard=tmp_path / "events")
    history.begin(0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for write in (
            lambda: [history.add_row({"step": step, "loss": 1.0}) for step in range(300)] and history.flush(),
            lambda: history.add_images("samples", torch.rand(4, 1, 8, 8), 1),
            lambda: history.write(tmp_path / "history.csv"),
        ):
            with pytest.raises(OSError, match="File too large") as error:
                write()
            assert error.value.filename in (str(tmp_path / "events"), str(tmp_path / "history.csv"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert capfd.readouterr().err == ""
