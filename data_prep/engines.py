"""Where work runs: in this process, in others of this machine, on a Ray cluster, or as Slurm jobs.

Work is a callable `work(name, task)` that leaves its files whole or not at all and returns plain values, JSON's. Every
process other than this one gets a copy by pickle, once. A task whose worker died is given to another; an error that
work itself raises ends the map, after what is being made was finished.
"""

import importlib.util
import json
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from queue import SimpleQueue
from shutil import which
from threading import Lock, Thread
from typing import Any, Literal, Protocol, TypeVar

import torch

from rg.cli import BAD_INPUT, quiet_libraries
from rg.data.samples import DataError

log = logging.getLogger(__name__)
T = TypeVar("T")
PRELOADED = ["data_prep.writer"]  # what takes a new process longest
Work = Callable[[str, T], Any]
# Runs one task somewhere and gives what `Worker` answers; raises WorkerDied.
Run = Callable[[str, T], str]


class Engine(Protocol):
    """See the module's docstring."""

    def map(self, work: Work[T], tasks: Mapping[str, T]) -> Iterator[tuple[str, Any]]:
        """Name and result of every task, in the order in which they are finished.

        Raises:
            DataError: bad input, by its text; a task whose worker died as often as was allowed, by its name.
            RuntimeError: any other error in another process, with its stack.
        """
        ...


class WorkerDied(Exception):
    """A worker ended without an answer: it was killed, ran out of memory or time, or its machine failed."""


class Worker:
    """Does tasks in a process that has nothing else to do.

    Args:
        work: what is done.
        folder: the working directory, to which relative paths are.
        threads: of torch.
        number: chooses among the machine's GPUs, where it has several.
    """

    def __init__(self, work: Work[T], folder: str, threads: int, number: int = 0) -> None:
        os.chdir(folder)
        torch.set_num_threads(threads)
        if torch.cuda.device_count() > 1:
            torch.cuda.set_device(number % torch.cuda.device_count())
        logging.basicConfig(format="%(message)s")
        quiet_libraries()
        self.work = work

    def __call__(self, name: str, task: T) -> str:
        """JSON of {"made": the result}, {"bad": what is bad in the input} or {"failed": the stack}."""
        try:
            return json.dumps({"made": self.work(name, task)})
        except BAD_INPUT as error:
            return json.dumps({"bad": str(error)})
        except Exception:
            return json.dumps({"failed": f"{name}: {traceback.format_exc()}"})


def read_answer(answer: str) -> Any:  # noqa: ANN401
    """What a worker made; raises what it answers."""
    content = json.loads(answer)
    if "bad" in content:
        raise DataError(content["bad"])
    if "failed" in content:
        raise RuntimeError(content["failed"])
    return content["made"]


class Serial:
    """Everything here, one after the other."""

    def map(self, work: Work[T], tasks: Mapping[str, T]) -> Iterator[tuple[str, Any]]:
        """As Engine.map; errors are raised as they are."""
        for name, task in tasks.items():
            yield name, work(name, task)


class _Minded:
    """An engine each of whose workers is minded by a thread of this process, which gives it one task at a time."""

    workers: int
    tries: int

    def _running(self, work: Work[T]) -> AbstractContextManager[Run[T]]:
        raise NotImplementedError

    def map(self, work: Work[T], tasks: Mapping[str, T]) -> Iterator[tuple[str, Any]]:
        """As Engine.map."""
        with ThreadPoolExecutor(self.workers) as minders, self._running(work) as run:
            futures = {minders.submit(self._try, run, name, task): name for name, task in tasks.items()}
            try:
                yield from _finished(futures)
            finally:
                for future in futures:
                    future.cancel()

    def _try(self, run: Run[T], name: str, task: T) -> Any:  # noqa: ANN401
        for number in range(1, self.tries + 1):
            try:
                return read_answer(run(name, task))
            except WorkerDied as error:
                last = error
                log.warning("%s: its worker died, try %d of %d: %s", name, number, self.tries, error)
        raise given_up([name], self.tries, str(last))


def _finished(futures: Mapping[Future[Any], str]) -> Iterator[tuple[str, Any]]:
    """Names and results as they come; after an error, raised at the end, only of what had been begun."""
    error = None
    for future in as_completed(futures):
        if future.cancelled():
            continue
        if (found := future.exception()) is None:
            yield futures[future], future.result()
        elif error is None:
            error = found
            for other in futures:
                other.cancel()
    if error is not None:
        raise error


def given_up(names: list[str], tries: int, last: str) -> DataError:
    """The error of tasks whose worker died at every try."""
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return DataError(f"{shown}: expected an end, but the worker died in each of {tries} tries (engine.tries): {last}")


class Pool(_Minded):
    """Processes of this machine, by the standard library.

    Args:
        workers: processes, each with networks of its own; with several GPUs each has one, in turn.
        tries: how often a task is begun whose process dies.
        threads: of torch in each.
    """

    def __init__(self, *, workers: int = 2, tries: int = 3, threads: int = 1) -> None:
        _check(workers=workers, tries=tries, threads=threads)
        self.workers, self.tries, self.threads = workers, tries, threads

    @contextmanager
    def _running(self, work: Work[T]) -> Iterator[Run[T]]:
        processes = [_Process(Worker, work, str(Path.cwd()), self.threads, number) for number in range(self.workers)]
        idle: SimpleQueue[_Process] = SimpleQueue()
        for process in processes:
            idle.put(process)

        def run(name: str, task: T) -> str:
            process = idle.get()
            try:
                return process.run(name, task)
            finally:
                idle.put(process)

        try:
            yield run
        finally:
            for process in processes:
                process.stop()


class _Process:
    """One process of a pool: begun when first needed, and again after it died."""

    def __init__(self, *worker: Any) -> None:
        self.worker = worker
        self.lock, self.stopped = Lock(), False
        self.executor: ProcessPoolExecutor | None = None
        self.pid = 0

    def run(self, name: str, task: Any) -> str:  # noqa: ANN401
        with self.lock:
            if self.stopped:
                raise CancelledError
            if self.executor is None:
                # Forked from a process that has only imported: CUDA and torch's threads would not outlive a fork.
                context = get_context("forkserver")
                context.set_forkserver_preload(PRELOADED)
                self.executor = ProcessPoolExecutor(1, mp_context=context)
        try:
            if not self.pid:
                self.pid = self.executor.submit(_begin, *self.worker).result()
            return self.executor.submit(_work, name, task).result()
        except BrokenProcessPool as error:
            with self.lock:
                self.executor, self.pid = None, 0
            raise WorkerDied(str(error)) from error

    def stop(self) -> None:
        """Ends the process, also in the middle of a task; what that had begun to write is removed."""
        with self.lock:
            self.stopped = True
            executor = self.executor
        if executor is not None:
            if self.pid:
                os.kill(self.pid, signal.SIGTERM)
            executor.shutdown(cancel_futures=True)


_here: list[Worker] = []


def _begin(kind: type[Worker], *arguments: Any) -> int:
    """Makes a pool's process a worker; its number."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    Thread(target=_end_with_parent, daemon=True).start()
    _here.append(kind(*arguments))
    return os.getpid()


def _end_with_parent() -> None:
    """The library's processes would wait for ever for tasks from one that was killed."""
    parent_process().join()
    os._exit(1)


def _work(name: str, task: Any) -> str:  # noqa: ANN401
    return _here[0](name, task)


class Slurm(_Minded):
    """Jobs of a Slurm cluster, one for each task, by submitit; all machines see this working directory.

    Args:
        workers: jobs that wait or run at once.
        tries: how often a task is begun whose job is killed, preempted or out of time.
        threads: of torch in each, and CPUs that are asked for.
        folder: what jobs say and answer.
        cluster: "slurm", or "local" for processes of this machine instead.
        parameters: of submitit's AutoExecutor, such as timeout_min, mem_gb, gpus_per_node and slurm_partition.
    """

    def __init__(
        self,
        *,
        workers: int = 8,
        tries: int = 3,
        threads: int = 1,
        folder: str = "outputs/slurm",
        cluster: Literal["slurm", "local"] = "slurm",
        parameters: Mapping[str, Any] | None = None,
    ) -> None:
        _require("submitit", "slurm")
        if cluster == "slurm" and which("srun") is None:
            raise DataError("engine.cluster=slurm: expected its command srun on this machine, found none")
        _check(workers=workers, tries=tries, threads=threads)
        self.workers, self.tries, self.threads = workers, tries, threads
        self.folder, self.cluster, self.parameters = folder, cluster, dict(parameters or {})

    @contextmanager
    def _running(self, work: Work[T]) -> Iterator[Run[T]]:
        import submitit

        executor = submitit.AutoExecutor(folder=self.folder, cluster=self.cluster)
        executor.update_parameters(cpus_per_task=self.threads, **self.parameters)
        lock, jobs, stopped = Lock(), {}, []

        def run(name: str, task: T) -> str:
            with lock:
                if stopped:
                    raise CancelledError
                job = executor.submit(_job, work, str(Path.cwd()), self.threads, name, task)
                jobs[job.job_id] = job
            try:
                return job.result()
            except (submitit.core.utils.FailedJobError, submitit.core.utils.UncompletedJobError) as error:
                raise WorkerDied(f"job {job.job_id}: {str(error).splitlines()[0]}; see {job.paths.stderr}") from error
            finally:
                del jobs[job.job_id]

        try:
            yield run
        finally:
            with lock:
                stopped.append(True)
                for job in list(jobs.values()):
                    job.cancel(check=False)


def _job(work: Work[T], folder: str, threads: int, name: str, task: T) -> str:
    return Worker(work, folder, threads)(name, task)


class Ray:
    """Actors of a Ray cluster, to which Ray Data gives the tasks' names; all machines see this working directory.

    Args:
        workers: actors, each with networks of its own.
        tries: how often a task is begun whose actor dies.
        threads: of torch in each, and CPUs that it takes.
        gpus: that each takes; may be a part of one.
        address: of a running cluster, or "auto"; None begins one on this machine and ends it.
    """

    def __init__(
        self, *, workers: int = 2, tries: int = 3, threads: int = 1, gpus: float = 0.0, address: str | None = None
    ) -> None:
        _require("ray", "ray")
        _check(workers=workers, tries=tries, threads=threads)
        self.workers, self.tries, self.threads, self.gpus, self.address = workers, tries, threads, gpus, address

    def map(self, work: Work[T], tasks: Mapping[str, T]) -> Iterator[tuple[str, Any]]:
        """As Engine.map."""
        left = dict(tasks)
        with self._cluster():
            for number in range(1, self.tries + 1):
                for name, answer in self._round(work, left):
                    result = read_answer(answer)
                    del left[name]
                    yield name, result
                if not left:
                    return
                log.warning("%s: the worker died, try %d of %d", ", ".join(left), number, self.tries)
        raise given_up(list(left), self.tries, "Ray's log says how")

    @contextmanager
    def _cluster(self) -> Iterator[None]:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15, its own, lets anything else go first
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it warns of what Ray Data does with actors
        import ray

        own = not ray.is_initialized()
        if own:
            here = {} if self.address else {"num_cpus": self.workers * self.threads, "include_dashboard": False}
            ray.init(address=self.address, logging_level=logging.ERROR, log_to_driver=False, **here)
        try:
            yield
        finally:
            if own:
                ray.shutdown()

    def _round(self, work: Work[T], tasks: Mapping[str, T]) -> Iterator[tuple[str, str]]:
        """Names and answers of all tasks but those whose actor died."""
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context.max_errored_blocks = -1  # a dead actor's task has no answer, and is in the next round
        size = min(self.workers, len(tasks))
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.|data_prep\.engines")
        answers = ray.data.from_items([{"name": name} for name in tasks], override_num_blocks=len(tasks)).map_batches(
            _Actor,
            fn_constructor_args=(work, str(Path.cwd()), self.threads, tasks),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
            num_cpus=self.threads,
            num_gpus=self.gpus,
            ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": 0},
        )
        for row in answers.iter_rows():
            yield row["name"], row["answer"]


class _Actor:
    """A worker as Ray Data calls it."""

    def __init__(self, work: Work[T], folder: str, threads: int, tasks: Mapping[str, T]) -> None:
        self.worker, self.tasks = Worker(work, folder, threads), tasks

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        names = [str(name) for name in batch["name"]]
        return {"name": names, "answer": [self.worker(name, self.tasks[name]) for name in names]}


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise DataError(
            f"engine={extra}: expected the package {package}, found none: pip install 'readout-guidance[{extra}]'"
        )


def _check(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise DataError(f"engine.{name}: expected at least 1, got {count}")


def local(*, workers: int = 1, tries: int = 3, threads: int = 1) -> Serial | Pool:
    """This process where one worker is asked for, else a pool of them; raises DataError for fewer than one."""
    return Serial() if workers == 1 else Pool(workers=workers, tries=tries, threads=threads)
