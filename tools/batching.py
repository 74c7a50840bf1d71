"""A queue before the model: what waits is recognised together, a piece of each request in turn."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

from manifest import Utterance


@dataclass(eq=False)
class Job:
    """The pieces of a request's audio; `done` is set when all of them are recognised.

    Whoever cancels `done` takes the job out of the queue.
    """

    pieces: list[Utterance]
    word_times: bool
    done: Future = field(default_factory=Future)

    def __post_init__(self):
        self.waiting = deque(self.pieces)
        self.unfinished = len(self.pieces)

    def finish_piece(self) -> None:
        self.unfinished -= 1
        if self.unfinished == 0:
            with suppress(InvalidStateError):  # its client went away just now
                self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        with suppress(InvalidStateError):
            self.done.set_exception(error)


class Batcher:
    """Calls `recognize(pieces, word_times)` in a thread of its own, with as many as wait.

    `recognize` adds hypotheses to at most `batch_size` pieces.
    """

    def __init__(self, recognize: Callable[[list[Utterance], bool], None], batch_size: int):
        self.recognize = recognize
        self.batch_size = batch_size
        self.jobs = deque()
        self.changed = threading.Condition()
        threading.Thread(target=self.run, daemon=True).start()

    def submit(self, pieces: list[Utterance], word_times: bool) -> Job:
        job = Job(pieces, word_times)
        with self.changed:
            self.jobs.append(job)
            self.changed.notify()
        return job

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.jobs)
                batch = self.take()
            if batch:
                self.recognize_batch(batch)

    def take(self) -> list[tuple[Job, Utterance]]:
        """A piece of each job in turn, so that short audio does not wait for the end of long."""
        batch = []
        while self.jobs and len(batch) < self.batch_size:
            job = self.jobs.popleft()
            if job.done.done():
                continue  # cancelled, or failed
            batch.append((job, job.waiting.popleft()))
            if job.waiting:
                self.jobs.append(job)
        return batch

    def recognize_batch(self, batch: list[tuple[Job, Utterance]]) -> None:
        """What fails together is tried one by one, so that only those fail who must."""
        word_times = any(job.word_times for job, _ in batch)
        try:
            self.recognize([piece for _, piece in batch], word_times)
        except Exception as error:
            if len(batch) == 1:
                batch[0][0].fail(error)
                return
            for job_and_piece in batch:
                self.recognize_batch([job_and_piece])
            return
        for job, _ in batch:
            job.finish_piece()
