import csv
import itertools
import math

import numpy as np
import pytest
import torch

from lsgm.config import ScheduleConfig
from lsgm.data.batches import Batches
from lsgm.errors import LSGMError, Stopped
from lsgm.training.distributed import Ranks
from lsgm.training.ema import EMA
from lsgm.training.engine import Engine, History, Optimised, Schedule, Task
from lsgm.training.objective import Objective
from lsgm.training.state import States

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
    """A training one can follow: minimise |w - the batch's mean|^2 with noise of its own; faults at chosen steps."""

    def __init__(self, out, faults=(), every=4, world=1, stream=False, **settings):
        torch.manual_seed(0)
        self.config = ScheduleConfig(**{"epochs": 2, "batch": 8, "warmup_epochs": 0} | settings)
        self.norm, self.w = torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)
        self.net = torch.nn.Sequential(self.norm, self.w)
        self.drop = torch.nn.Dropout(0.3)
        optimiser = torch.optim.AdamW(self.w.parameters(), lr=0.1)
        self.faults, self.calls, self.stop_at = dict(faults), [], None
        self.ema = EMA(self.w, 0.9)
        task = Task(
            optimised=[Optimised("w", optimiser, 0.1, 0.01)],
            objective=self.objective,
            regularisers=[(0.1, lambda: 1 + 0 * self.w.weight.sum())],
            after_step=self.ema.update,
            parts={"net": self.net, "ema": self.ema},
            networks={"net": self.net},
            summarise=lambda vectors: {},
            look=self.look,
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
        with pytest.raises(Stopped, match=f"told to stop after step {stop + 1}; the same command goes on"):
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
    without, looking = Quadratic(tmp_path / "a"), Quadratic(tmp_path / "b", look_epochs=0.5)
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
    rescue = {"bad_steps": 3, "tries": 2, "lr_factor": 0.5, "spectral_factor": 2}
    toy = Quadratic(tmp_path, epochs=6, rescue=rescue, state_minutes=1e-9)
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
        tmp_path, epochs=6, rescue={"bad_steps": 2, "tries": 2}, faults=dict.fromkeys(range(30, 48), math.nan)
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
    rescue = {"bad_steps": 2, "tries": 1}
    toy = Quadratic(tmp_path, faults={s: float("nan") for s in range(20, 30)}, epochs=6, rescue=rescue)
    message = (
        r"toy: diverged at step .* after 1 restarts .*not finite: .*reconstruction.*largest in net\.0\.weight: nan"
    )
    with pytest.raises(LSGMError, match=message):
        toy.engine.fit()


def test_what_gives_up_is_recorded_where_that_is_asked_for(tmp_path):
    """The last good state is what is left; the history and the summary say where it diverged."""
    rescue = {"bad_steps": 2, "tries": 1, "give_up": "record"}
    toy = Quadratic(tmp_path, faults=dict.fromkeys(range(20, 30), math.nan), epochs=6, rescue=rescue)
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


def test_parts_of_a_batch_add_up_to_it(tmp_path):
    """Dropout and the statistics of batch norm apart, which this has none of."""
    one, four = (Quadratic(tmp_path / str(n), accumulate=n) for n in (1, 4))
    for toy in (one, four):
        toy.drop = torch.nn.Identity()
        toy.norm.eval()
        toy.engine.fit()
    for a, b in zip(one.result()[0], four.result()[0], strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(LSGMError, match="batch: 8 images cannot be shared evenly by 1 processes of 3 parts"):
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
