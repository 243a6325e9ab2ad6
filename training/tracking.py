"""What a run tells about itself: metrics.jsonl, TensorBoard events, a bar or plain lines, speed.

It writes and prints what it is given, and knows no model.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat, runtime_checkable

import numpy as np
from tqdm import tqdm

from runtime.files import atomic_file
from training.step import StepReport

if TYPE_CHECKING:
    import PIL.Image
    from tensorboardX import SummaryWriter

Metrics = Mapping[str, SupportsFloat | Sequence[SupportsFloat | None]]

MIN_FREE_BYTES = 2**20

# What a person watches; everything else is in the file.
SHOWN: dict[str, Callable[[float], str]] = {
    "loss": lambda x: f"loss {x:.4f}",
    "eval_loss": lambda x: f"eval loss {x:.4f}",
    "psnr": lambda x: f"PSNR {x:.2f} dB",
    "grad_norm": lambda x: f"grad {x:.3g}",
    "learning_rate": lambda x: f"lr {x:.1e}",
    "images_per_second": lambda x: f"{x:.0f} images/s" if x >= 10 else f"{x:.2g} images/s",
    "mfu": lambda x: f"{x:.1%} MFU",
}
DISTANCES = ("fid_", "pixel_frechet_")  # how names begin that end in a number of pictures


@runtime_checkable
class Sink(Protocol):
    """Where a run is recorded besides its folder. No method may raise or wait for long."""

    def open(self, message: Callable[[str], None]) -> None: ...
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def image(self, step: int, name: str, image: "PIL.Image.Image") -> None: ...
    def close(self) -> None: ...


class Tracker:
    """Records a run in its folder and shows it. Belongs to process 0 alone.

    A resumed run continues its folder: what was recorded after `start_step`, and a line torn by a
    kill, is dropped first, so that the record equals an uninterrupted run's. A run that starts at 0
    starts its record anew.

    Args:
        folder: the run's folder; metrics.jsonl and the events are written into it.
        start_step: the last step that is already done.
        n_steps: the last step of the whole run.
        quiet: print nothing.
        sinks: where it is recorded besides.
    """

    def __init__(
        self,
        folder: Path,
        *,
        start_step: int = 0,
        n_steps: int,
        quiet: bool = False,
        sinks: Sequence[Sink] = (),
    ):
        self.sinks = sinks
        self.folder, self.n_steps, self.quiet, self.room = folder, n_steps, quiet, True
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        resumed = self.path.exists()
        if resumed:
            rewind(self.path, start_step)
        self.file = self.path.open("a", encoding="utf-8")
        purge_step = start_step + 1 if start_step else 0
        self.writer = _writer(folder, purge_step=purge_step if resumed else None)
        self.bar = None
        if sys.stdout.isatty() and not quiet:
            self.bar = tqdm(
                initial=start_step, total=n_steps, unit="step", dynamic_ncols=True, file=sys.stdout
            )
        self.postfix: dict[str, str] = {}  # of the bar: an eval loss stays while losses come and go

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self) -> None:
        """Open the sinks: only when something will be recorded, for that may take a while."""
        for sink in self.sinks:
            sink.open(self.message)

    def close(self) -> None:
        """Flush and close everything. May be called twice."""
        for sink in self.sinks:
            sink.close()
        self.writer.close()
        self.file.close()
        if self.bar is not None:
            self.bar.close()

    def rewind(self, step: int) -> None:
        """Go back to `step`: what was recorded after it is dropped."""
        self.file.close()
        rewind(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")
        self.writer.close()
        self.writer = _writer(self.folder, purge_step=step + 1)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def log(self, step: int, metrics: Metrics) -> None:
        """Record one line: {"step": step, …}; on a full disk, only show it.

        A list holds equal bins of t from 0 to 1, such as `loss_by_t`. None is an empty bin. A
        non-finite number becomes null in the file, for JSON has no word for it; TensorBoard gets
        neither.
        """
        line = {name: _plain(value) for name, value in metrics.items()}
        if self._has_room():
            # In one write and at once: a kill can tear this line but lose none before it.
            self.file.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
            self.file.flush()
            numbers = dict(pair for item in line.items() for pair in _scalars(*item))
            for tag, number in numbers.items():
                self.writer.add_scalar(tag, number, step)
            self.writer.flush()
            for sink in self.sinks:
                sink.log(step, numbers)
        self._show(step, metrics)

    def image(self, step: int, name: str, image: "PIL.Image.Image") -> None:
        """Put a picture into TensorBoard under `name`."""
        if not self._has_room():
            return
        for sink in self.sinks:
            sink.image(step, name, image)
        self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
        self.writer.flush()

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def message(self, text: str) -> None:
        """Print `text`, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        elif not self.quiet:
            print(text, flush=True)

    def _has_room(self) -> bool:
        """Whether the disk takes some lines more. Asked first: half a line would be worse than
        none, and the writer of events waits forever for a thread that died of a full disk.
        """
        had_room, self.room = self.room, shutil.disk_usage(self.folder).free >= MIN_FREE_BYTES
        if had_room and not self.room:
            self.message(f"no space left on the disk of {self.folder}: metrics are not recorded")
        return self.room

    def _show(self, step: int, metrics: Mapping[str, Any]) -> None:
        shown = {name: form(metrics[name]) for name, form in SHOWN.items() if name in metrics}
        shown |= {n: f"{n} {x:.4g}" for n, x in metrics.items() if n.startswith(DISTANCES)}
        if self.bar is not None:
            self.postfix |= shown
            self.bar.set_postfix_str(", ".join(self.postfix.values()))
        elif shown:
            if "seconds_per_step" in metrics:
                left = (self.n_steps - step) * metrics["seconds_per_step"]
                shown["left"] = f"{duration(left)} left"
            width = len(str(self.n_steps))
            self.message("   ".join([f"step {step:{width}}/{self.n_steps}", *shown.values()]))


class NullTracker:
    """What the other processes of a run tell of it: nothing. The methods of `Tracker` that are
    called in a run.
    """

    def __enter__(self) -> "NullTracker":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _nothing(self, *_: object) -> None:
        pass

    begin = rewind = log = image = advance = message = _nothing


def _writer(folder: Path, *, purge_step: int | None) -> "SummaryWriter":
    from tensorboardX import SummaryWriter  # 0.2 s that other commands need not wait for

    return SummaryWriter(str(folder), purge_step=purge_step)


def rewind(path: Path, step: int) -> None:
    """Drop, atomically, the lines of a metrics.jsonl after `step` (all, if 0) and torn ones."""

    def belongs(line: str) -> bool:
        try:
            return 0 < step >= json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            return False

    old = path.read_bytes()
    lines = old.decode("utf-8", errors="replace").splitlines()
    new = "".join(f"{line}\n" for line in lines if belongs(line)).encode()
    if new == old:
        return
    with atomic_file(path) as file:
        file.write(new)


def duration(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _plain(value: Any) -> Any:
    """A number, or a list of numbers, of any library as what JSON knows; None if not finite."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(number) for number in value]
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _scalars(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The tags and numbers that TensorBoard gets for one metric."""
    if isinstance(value, list):
        for i, number in enumerate(value):
            low, high = i / len(value), (i + 1) / len(value)
            yield from _scalars(f"{name}/{low:.1f}-{high:.1f}", number)
    elif value is not None:
        yield name, value


def metrics_line(report: StepReport) -> dict[str, Any]:
    """A line of metrics from a step's fetched report: means over the steps since the last line, and
    the norms of this step. A loss in bins of t becomes the mean loss of each bin.
    """
    window = dict(report.window)
    n_steps = window.pop("steps") or math.nan  # none of them was finite
    means = {name: total / n_steps for name, total in window.items()}
    line: dict[str, Any] = {}
    if report.loss_scale is not None:
        line["loss_scale"] = float(report.loss_scale)
    line["param_norm"] = float(report.param_norm)
    line["update_norm"] = float(report.update_norm)
    if "binned_loss" in means:
        bins = zip(means.pop("binned_loss"), means.pop("bin_share"), strict=True)
        line["loss_by_t"] = [float(loss / share) if share else None for loss, share in bins]
    return {name: float(value) for name, value in means.items()} | line


class Throughput:
    """Images per second and seconds per step of training alone.

    Evaluation, sampling and saving run inside `paused()`; the first step, which compiles, is never
    counted. Steps are asynchronous: wait for the device before `paused()` and before `take()`, or
    the time of one ends up with the other.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.since: float | None = None  # when the clock was last started; None while it stands
        self.warm = False
        self.seconds, self.n_steps, self.n_images = 0.0, 0, 0

    def step(self, n_images: int) -> None:
        """Count a step of `n_images`."""
        if self.warm:
            self.n_steps += 1
            self.n_images += n_images
        else:
            self.warm, self.since = True, self.clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside. May be nested, and `take` may be called inside."""
        running = self.since is not None
        self._bank()
        self.since = None
        try:
            yield
        finally:
            self.since = self.clock() if running else None

    def take(self) -> dict[str, float]:
        """`images_per_second` and `seconds_per_step` since the last; empty if no step counts."""
        self._bank()
        seconds, n_steps, n_images = self.seconds, self.n_steps, self.n_images
        if not n_steps or seconds <= 0:
            return {}
        self.seconds, self.n_steps, self.n_images = 0.0, 0, 0
        return {"images_per_second": n_images / seconds, "seconds_per_step": seconds / n_steps}

    def _bank(self) -> None:
        if self.since is not None:
            now = self.clock()
            self.seconds, self.since = self.seconds + now - self.since, now
