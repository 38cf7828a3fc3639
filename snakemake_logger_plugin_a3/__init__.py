"""What `snakemake` prints: one line a job, a progress bar, the end of a failed job's log.

Snakemake finds a logger plugin by the name of its package, so this is not a module of `a3`. The
profile for this machine chooses it (`logger: a3`). The full text is in Snakemake's own log.
"""

import os
import sys
import time
from collections.abc import Callable
from logging import LogRecord

from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent

from a3.core.progress import Bar
from snakemake_logger_plugin_a3.jobs import Job, duration, end_of, jobs

NOTHING = "Nothing to be done"
COMPLETE_LOG = "Complete log(s): "
# Messages that start with these say nothing beside the lines of jobs. All others are shown.
NOISE = (
    "Assuming unrestricted shared filesystem",
    "Building DAG of jobs",
    "Conda environments: ignored",
    "Elapsed time:",
    "Exiting because a job execution failed",
    "host: ",
    "Processed ",
    "Reasons:",
    "Removing output files of failed job",
    "Removing temporary output",
    "Rules with provenance triggered jobs",
    "Select jobs to execute",
    "Shutting down",
    "Some jobs were triggered by provenance",
    "This was a dry-run",
    "Using shell:",
)
# The rule that only asks for others.
ALL = "all"


class LogHandler(LogHandlerBase):
    """Prints the events of a run."""

    writes_to_stream = True
    writes_to_file = False
    has_filter = False
    has_formatter = False
    needs_rulegraph = False

    def __post_init__(self) -> None:
        """Start with no job seen."""
        self.stream = sys.stdout if self.common_settings.stdout else sys.stderr
        self.running: dict[int, Job] = {}
        self.failed: set[int] = set()
        self.total = self.done = 0
        self.start = time.time()
        self.bar: Bar | None = None
        self.events: dict[LogEvent | None, Callable[[LogRecord], None]] = {
            LogEvent.RUN_INFO: self.run_info,
            LogEvent.JOB_INFO: self.job_info,
            LogEvent.SHELLCMD: self.command,
            LogEvent.JOB_FINISHED: self.job_finished,
            LogEvent.JOB_ERROR: self.job_error,
            LogEvent.ERROR: self.error,
            LogEvent.GROUP_ERROR: self.as_it_is,
            None: self.message,
        }

    def emit(self, record: LogRecord) -> None:
        """Print what a record says, if anything."""
        try:
            event = getattr(record, "event", None)
            if self.common_settings.verbose or self.common_settings.debug_dag:
                self.as_it_is(record)
            elif event in self.events:
                self.events[event](record)
        except Exception:
            self.handleError(record)

    def close(self) -> None:
        """Say how many jobs a dry run found."""
        self.take_bar_away()
        if self.common_settings.dryrun and self.total:
            self.print(f"{jobs(self.total)} would run; nothing was run")
            self.total = 0
        super().close()

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        Bar.write(text, file=self.stream)
        self.stream.flush()

    def as_it_is(self, record: LogRecord) -> None:
        """Print a record in Snakemake's own words."""
        if (text := self.format(record)) not in ("", "None"):
            self.print(text)

    def run_info(self, record: LogRecord) -> None:
        """Take the number of jobs."""
        stats = vars(record)["stats"]
        self.total = stats["total"] - stats.get(ALL, 0)

    def job_info(self, record: LogRecord) -> None:
        """A job starts, or would."""
        number, job = vars(record)["jobid"], Job.of(record)
        if job.rule == ALL:
            return
        if self.common_settings.dryrun:
            self.print(f"{job.name}  ({job.why})")
            return
        self.running[number] = job
        self.failed.discard(number)  # it is tried again
        if self.bar is None and self.stream.isatty():
            self.bar = Bar(
                total=self.total,
                file=self.stream,
                leave=False,
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} |{bar}| {elapsed} {desc}",
            )
        self.show_running()

    def show_running(self) -> None:
        """Move the bar, and name the jobs that run beside it."""
        if self.bar is not None:
            self.bar.n = self.done
            names = ", ".join(" ".join(job.name.split()) for job in self.running.values())
            self.bar.set_description_str(names if len(names) <= 50 else names[:49] + "…")

    def take_bar_away(self) -> None:
        """Leave nothing of the bar on the terminal."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def command(self, record: LogRecord) -> None:
        """Print a job's command, which the user asked for (-p)."""
        if shell := vars(record)["shellcmd"]:
            self.print(f"    {shell}")

    def job_finished(self, record: LogRecord) -> None:
        """Print the line of a finished job."""
        job = self.running.pop(vars(record)["job_id"], None)
        if job is None:
            return
        self.done += 1
        took = duration(record.created - job.started)
        count = f"[{self.done:>{len(str(self.total))}}/{self.total}]"
        self.print("  ".join(filter(None, (f"{count} {job.name}", took, job.figure))))
        self.show_running()

    def job_error(self, record: LogRecord) -> None:
        """Print a failed job, the end of its log, and its command where it has no log."""
        said = vars(record)
        job = self.running.pop(said["jobid"], None)
        self.failed.add(said["jobid"])
        name = f"{job.what} {job.subject}" if job else said["rule_name"]
        after = f" after {duration(record.created - job.started)}" if job else ""
        self.print(f"FAILED {name}{after}")
        self.print(end_of(said["log"]) if said["log"] else f"  {said['shellcmd']}")
        self.show_running()

    def error(self, record: LogRecord) -> None:
        """Print an exception, but not that of a job, whose own lines say more."""
        text = record.getMessage()
        if "CalledProcessError" in text or (self.failed and "At least one job did not" in text):
            return
        self.print(text)

    def message(self, record: LogRecord) -> None:
        """Print a message that is no event: the end of the run, warnings, all but noise."""
        text = record.getMessage()
        if text.startswith(NOTHING):
            self.print("nothing to do: results are up to date")
        elif text.startswith(COMPLETE_LOG):
            self.finish(os.path.relpath(text.removeprefix(COMPLETE_LOG)))
        elif not text.startswith(NOISE):
            self.as_it_is(record)

    def finish(self, log: str) -> None:
        """Say how the run ended, and where all of it is written down."""
        self.take_bar_away()
        took = duration(time.time() - self.start)
        if self.failed:
            self.print(
                f"{jobs(len(self.failed))} failed, {self.done} of {self.total} done. Correct what "
                f"the log says and start again: what is done stays. Full log: {log}"
            )
        else:
            self.print(f"{jobs(self.done)} done in {took}. Full log: {log}")
