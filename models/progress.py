"""Progress of an epoch: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

PLAIN_SECONDS = 10.0
BAR_SECONDS = 0.2


class Progress:
    """Utterances done in one epoch and their rate, on stderr.

    Args:
        title: what is going on.
        total: utterances of the epoch.
        done: utterances that an earlier run of the same epoch did.
        shown: False for silence.
    """

    def __init__(self, title: str, total: int, done: int = 0, shown: bool = True) -> None:
        self._title = title
        self._total = total
        self._start = done
        self._done = done
        self._begin = self._last = time.monotonic()
        self._shown = shown
        self._bar = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, desc=title, unit="utt", leave=False, file=sys.stderr
            )

    @property
    def rate(self) -> float:
        """Utterances per second since the start."""
        return (self._done - self._start) / max(time.monotonic() - self._begin, 1e-9)

    @property
    def due(self) -> bool:
        """Whether it is time to show a new loss, which has to be fetched from the device."""
        elapsed = time.monotonic() - self._last
        return self._shown and elapsed > (PLAIN_SECONDS if self._bar is None else BAR_SECONDS)

    def advance(self, utterances: int) -> None:
        """Count finished utterances."""
        self._done += utterances
        if self._bar is not None:
            self._bar.update(utterances)

    def show(self, loss: float) -> None:
        """Show the loss of the last step beside the count."""
        self._last = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.3f}")
        elif self._shown:
            print(
                f"{self._title}: {self._done}/{self._total} utterances, "
                f"{self.rate:.0f} utterances/s, loss {loss:.3f}",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
