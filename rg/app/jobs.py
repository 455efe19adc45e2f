"""One job at a time on the one model: a queue, a time limit, and a way to stop."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

# Gets what a job has so far; raises Stopped where the job is to end.
Report = Callable[[Any], None]


class Stopped(Exception):
    """A job was ended by its user or by the time limit; the message says by whom."""


class Jobs:
    """Runs jobs one after another in one thread.

    Args:
        seconds: that a job may take.
        waiting: how many jobs may wait for the one that runs.
    """

    def __init__(self, *, seconds: float, waiting: int) -> None:
        self.seconds, self.waiting = seconds, waiting
        self._worker = ThreadPoolExecutor(1, "job")
        self._lock = threading.Lock()
        self._stops: dict[str, threading.Event] = {}

    def stop(self, session: str) -> None:
        """Ends the job of a session at its next step, or before it begins."""
        with self._lock:
            if session in self._stops:
                self._stops[session].set()

    def run(self, session: str, job: Callable[[Report], Any]) -> Iterator[Any]:
        """Yields what `job(report)` reports while it runs, of several reports the newest, and last what it returns.

        Args:
            session: whose job it is; each has one at a time.

        Raises:
            ValueError: the session has a job already, or too many are waiting.
            Stopped: it was stopped, or took too long.
        """
        stop = self._enter(session)
        reports: queue.SimpleQueue[Any] = queue.SimpleQueue()
        try:
            future = self._worker.submit(self._work, job, stop, reports.put)
            yield from self._watch(future, reports)
            yield future.result()
        finally:
            stop.set()
            with self._lock:
                self._stops.pop(session, None)

    def _enter(self, session: str) -> threading.Event:
        with self._lock:
            if session in self._stops:
                raise ValueError("queue: expected one job at a time, found another of yours: wait for it, or stop it")
            if len(self._stops) > self.waiting:
                raise ValueError(f"queue: expected at most {self.waiting} waiting jobs, found no place: try again soon")
            self._stops[session] = threading.Event()
            return self._stops[session]

    def _work(self, job: Callable[[Report], Any], stop: threading.Event, put: Callable[[Any], None]) -> Any:
        end = time.monotonic() + self.seconds

        def report(value: Any) -> None:
            if stop.is_set():
                raise Stopped("stopped: nothing is kept")
            if time.monotonic() > end:
                raise Stopped(f"stopped after the time limit of {self.seconds:g} s: take fewer steps")
            put(value)

        report(None)
        return job(report)

    @staticmethod
    def _watch(future: Future[Any], reports: "queue.SimpleQueue[Any]") -> Iterator[Any]:
        while not future.done() or not reports.empty():
            try:
                value = reports.get(timeout=0.05)
                while not reports.empty():
                    value = reports.get()
            except queue.Empty:
                continue
            if value is not None:
                yield value
