"""The log of a run: metrics.jsonl, TensorBoard events, a progress bar or plain lines, and speed.

It writes and prints given metrics, and knows no model.
"""

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, SupportsFloat, runtime_checkable

import numpy as np
from tqdm import tqdm

from runtime.files import atomic_file

if TYPE_CHECKING:
    import PIL.Image
    from tensorboardX import SummaryWriter

Metrics = Mapping[str, SupportsFloat | Sequence[SupportsFloat | None]]

MIN_FREE_BYTES = 2**20
NEVER = 1_000_000  # seconds; the most that a thread can wait are 2,147,483

# Metrics that are printed, and how; the others are only in the file.
PRINTED: dict[str, Callable[[float], str]] = {
    "loss": lambda x: f"loss {x:.4f}",
    "inner_loss": lambda x: f"inner loss {x:.4f}",
    "eval_loss": lambda x: f"eval loss {x:.4f}",
    "psnr": lambda x: f"PSNR {x:.2f} dB",
    "grad_norm": lambda x: f"grad {x:.3g}",
    "learning_rate": lambda x: f"lr {x:.1e}",
    "images_per_second": lambda x: f"{x:.0f} images/s" if x >= 10 else f"{x:.2g} images/s",
    "mfu": lambda x: f"{x:.1%} MFU",
}
FID_PREFIXES = ("fid_", "pixel_frechet_")  # of names that end in a number of images


@runtime_checkable
class Sink(Protocol):
    """A place besides its folder that a run is logged to. No method may raise or wait for long."""

    def open(self, message: Callable[[str], None]) -> None: ...
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def image(self, step: int, name: str, image: "PIL.Image.Image") -> None: ...
    def close(self) -> None: ...


class Tracker:
    """Logs a run to its folder and to the terminal. For process 0 only.

    A resumed run continues its folder. Lines after `start_step`, and a line torn by a kill, are
    dropped first, so that the log equals that of an uninterrupted run. A run that starts at step 0
    starts its log anew.

    Args:
        folder: the run's folder; metrics.jsonl and the events are written into it.
        start_step: the last step that is already done.
        n_steps: the last step of the whole run.
        quiet: print nothing.
        sinks: further places to log to.
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
        self.folder = folder
        self.n_steps = n_steps
        self.quiet = quiet
        self.sinks = sinks
        self.has_room = True
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
        # The text after the bar: an eval loss stays while losses come and go.
        self.postfix: dict[str, str] = {}

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self) -> None:
        """Open the sinks. It may take a while, so only once something will be logged."""
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
        """Drop everything after `step`, for a rollback."""
        self.file.close()
        rewind(self.path, step)
        self.file = self.path.open("a", encoding="utf-8")
        self.writer.close()
        self.writer = _writer(self.folder, purge_step=step + 1)
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def log(self, step: int, metrics: Metrics) -> None:
        """Log one line: {"step": step, …}. On a full disk, only print it.

        A list holds equal bins of t from 0 to 1, such as `loss_by_t`; None is an empty bin. A
        non-finite number becomes null in the file, because JSON has none; TensorBoard gets neither.
        """
        line = {name: _as_json(value) for name, value in metrics.items()}
        if self._check_room():
            # One write, flushed at once: a kill can tear this line but loses none before it.
            self.file.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
            self.file.flush()
            scalars = dict(pair for item in line.items() for pair in _scalars(*item))
            for tag, number in scalars.items():
                self.writer.add_scalar(tag, number, step)
            self.writer.flush()
            for sink in self.sinks:
                sink.log(step, scalars)
        self._print(step, metrics)

    def image(self, step: int, name: str, image: "PIL.Image.Image") -> None:
        """Log an image to TensorBoard under `name`."""
        if not self._check_room():
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

    def _check_room(self) -> bool:
        """Return True if the disk has room for a few lines. Check it before writing: half a line
        would be worse than none, and TensorBoard's writer waits forever for a thread that died of a
        full disk.
        """
        had_room = self.has_room
        self.has_room = shutil.disk_usage(self.folder).free >= MIN_FREE_BYTES
        if had_room and not self.has_room:
            self.message(f"no space left on the disk of {self.folder}: metrics are not recorded")
        return self.has_room

    def _print(self, step: int, metrics: Mapping[str, Any]) -> None:
        texts = {
            name: format_metric(metrics[name])
            for name, format_metric in PRINTED.items()
            if name in metrics
        }
        for name, value in metrics.items():
            if name.startswith(FID_PREFIXES):
                texts[name] = f"{name} {value:.4g}"
        if self.bar is not None:
            self.postfix |= texts
            self.bar.set_postfix_str(", ".join(self.postfix.values()))
        elif texts:
            if "seconds_per_step" in metrics:
                seconds_left = (self.n_steps - step) * metrics["seconds_per_step"]
                texts["left"] = f"{duration(seconds_left)} left"
            width = len(str(self.n_steps))
            self.message("   ".join([f"step {step:{width}}/{self.n_steps}", *texts.values()]))


class NullTracker:
    """A no-op tracker for processes other than 0, with the methods that a run calls."""

    def __enter__(self) -> "NullTracker":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def log(self, step: int, metrics: Metrics) -> None:
        pass

    def image(self, step: int, name: str, image: "PIL.Image.Image") -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass


def _writer(folder: Path, *, purge_step: int | None) -> "SummaryWriter":
    with _without_torch():
        from tensorboardX import SummaryWriter  # 0.2 s that other commands need not wait for

    # Flushed by the tracker alone: the writer's own thread would end in a traceback on a full disk.
    return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=NEVER)


@contextmanager
def _without_torch() -> Generator[None]:
    """Meanwhile, do not find torch, unless it is there already. TensorboardX imports it where it is
    installed, for the name of a type: a second of every run.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  (as the import system has it)
    try:
        yield
    finally:
        del sys.modules["torch"]


def rewind(path: Path, step: int) -> None:
    """Drop the lines of a metrics.jsonl after `step` (all, if 0) and torn ones, atomically."""

    def is_kept(line: str) -> bool:
        try:
            return 0 < step >= json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            return False

    old = path.read_bytes()
    lines = old.decode("utf-8", errors="replace").splitlines()
    new = "".join(f"{line}\n" for line in lines if is_kept(line)).encode()
    if new == old:
        return
    with atomic_file(path) as file:
        file.write(new)


def duration(seconds: float) -> str:
    """Format seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _as_json(value: Any) -> Any:
    """Convert a number, or a list of numbers, of any library to JSON; None if not finite."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_as_json(number) for number in value]
    if value is None or isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


def _scalars(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The tags and numbers of one metric in TensorBoard."""
    if isinstance(value, list):
        for i, number in enumerate(value):
            low, high = i / len(value), (i + 1) / len(value)
            yield from _scalars(f"{name}/{low:.1f}-{high:.1f}", number)
    elif value is not None:
        yield name, value


class Throughput:
    """Measures images per second and seconds per step of training alone.

    Evaluation, sampling and saving run inside `paused()`. The first step, which compiles, is never
    counted. Steps are asynchronous: wait for the device before `paused()` and before `take()`, or
    the time of one counts for the other.
    """

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.since: float | None = None  # when the clock was last started; None while paused
        self.warm = False
        self._reset()

    def step(self, n_images: int) -> None:
        """Count a step of `n_images`."""
        if self.warm:
            self.n_steps += 1
            self.n_images += n_images
        else:
            self.warm = True
            self.since = self.clock()

    @contextmanager
    def paused(self) -> Generator[None]:
        """Pause the clock. May be nested, and `take` may be called inside."""
        running = self.since is not None
        self._bank()
        self.since = None
        try:
            yield
        finally:
            self.since = self.clock() if running else None

    def take(self) -> dict[str, float]:
        """Return `images_per_second` and `seconds_per_step` since the last call, and start anew.
        Empty if no step was counted.
        """
        self._bank()
        seconds, n_steps, n_images = self.seconds, self.n_steps, self.n_images
        if not n_steps or seconds <= 0:
            return {}
        self._reset()
        return {"images_per_second": n_images / seconds, "seconds_per_step": seconds / n_steps}

    def _reset(self) -> None:
        self.seconds = 0.0
        self.n_steps = 0
        self.n_images = 0

    def _bank(self) -> None:
        """Add the time since the clock was started."""
        if self.since is not None:
            now = self.clock()
            self.seconds = self.seconds + now - self.since
            self.since = now
