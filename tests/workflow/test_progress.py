"""What Snakemake prints through our logger plugin, from records such as a run makes."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from snakemake.logging import DefaultFilter, DefaultFormatter
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.tests import MockOutputSettings, TestLogHandlerBase

from snakemake_logger_plugin_a3 import LogHandler
from snakemake_logger_plugin_a3.jobs import duration

ROOT = Path(__file__).parents[2]
RUN = {"model": "tiny", "run": "short/obs+joint~+dense/0.25"}
COMPRESSED = {"model": "tiny", "calibration": "short", "qk": "obs", "ov": "joint~", "mlp": "dense"}


class TestAsSnakemakeAsks(TestLogHandlerBase):
    """The tests that every logger plugin should pass."""

    __test__ = True

    def get_log_handler_cls(self):
        return LogHandler

    def get_log_handler_settings(self):
        return None


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self):
        return True


class Said:
    """A handler whose output is kept, and which hears records one second apart."""

    def __init__(self, stream=None, **settings):
        common = MockOutputSettings()
        common.printshellcmds = False
        vars(common).update(settings)
        self.handler = LogHandler(common, None)
        quiet = (set(), False, common.verbose, common.dryrun, common.printshellcmds)
        self.handler.addFilter(DefaultFilter(*quiet))
        self.handler.setFormatter(DefaultFormatter())
        self.handler.stream = self.stream = stream or io.StringIO()
        self.handler.handleError = self.fail
        self.time = 1000.0

    @staticmethod
    def fail(record):
        raise

    def say(self, event, text="None", level=logging.INFO, **extra):
        record = logging.LogRecord("snakemake", level, "x.py", 1, text, (), None)
        vars(record).update(extra | ({"event": event} if event else {}), created=self.time)
        self.time += 1
        self.handler.handle(record)

    def total(self, **stats):
        self.say(LogEvent.RUN_INFO, stats=stats | {"all": 1, "total": sum(stats.values()) + 1})

    def job(self, number, rule, wildcards, output=(), reason="Missing output files: x; Forced"):
        said = {"jobid": number, "rule_name": rule, "wildcards": wildcards, "output": list(output)}
        self.say(LogEvent.JOB_INFO, **said, reason=reason)
        self.say(LogEvent.SHELLCMD, shellcmd=f"a3 {rule}" if rule != "all" else None)

    def lines(self):
        return self.stream.getvalue().splitlines()


def test_two_jobs_at_once_have_a_line_each_with_seconds_and_figures(tmp_path):
    (tmp_path / "ppl.json").write_text(json.dumps({"perplexity": 1234.567}))
    (tmp_path / "acc.json").write_text(json.dumps({"metric": "acc", "value": 0.5}))
    (tmp_path / "none.json").write_text(json.dumps({"metric": "acc", "value": None}))
    said = Said()
    said.total(approx=1, eval_ppl=1, eval_harness=2, collect_together=1, tables=1)
    said.job(1, "eval_ppl", RUN | {"text": "score"}, [tmp_path / "ppl.json"])
    said.job(2, "approx", COMPRESSED | {"ratio": "0.2"})
    for number in (1, 2):
        said.say(LogEvent.JOB_FINISHED, job_id=number)
    dense = {"model": "tiny", "run": "dense", "task": "titles"}
    for number, name in ((3, "acc"), (4, "none")):
        said.job(number, "eval_harness", dense, [tmp_path / f"{name}.json"])
        said.say(LogEvent.JOB_FINISHED, job_id=number)
    shard = {"model": "tiny", "calibration": "short", "shard_folder": "/shards/0of3"}
    said.job(5, "collect_together_2", shard)
    said.say(LogEvent.JOB_FINISHED, job_id=5)
    said.job(6, "tables", {})
    said.say(LogEvent.JOB_FINISHED, job_id=6)
    said.job(0, "all", {})
    said.say(LogEvent.JOB_FINISHED, job_id=0)
    said.say(None, f"Complete log(s): {Path.cwd()}/.snakemake/log/x.log")
    end = said.lines().pop()
    assert said.lines()[:-1] == [
        "[1/6] eval ppl       tiny short obs+joint~+dense 0.25 score  4.0 s  perplexity 1,234.57",
        "[2/6] approx         tiny short obs+joint~+dense 0.2  3.0 s",
        "[3/6] eval harness   tiny dense titles  2.0 s  acc 0.500",
        "[4/6] eval harness   tiny dense titles  2.0 s",
        "[5/6] collect        tiny short 0of3  2.0 s",
        "[6/6] tables  2.0 s",
    ]
    assert end.startswith("6 jobs done in ")
    assert end.endswith(". Full log: .snakemake/log/x.log")


def test_a_failed_job_shows_the_end_of_its_log_and_what_to_do(tmp_path):
    log = tmp_path / "job.log"
    log.write_text("".join(f"line {i}\n" for i in range(40)) + "a3: error: no space\n")
    said = Said()
    said.total(approx=3)
    for number, logs in ((1, [str(log)]), (2, []), (3, [str(tmp_path / "empty.log")])):
        said.job(number, "approx", COMPRESSED | {"ratio": "0.2"})
        text = "RuleException:\nCalledProcessError in file approx.smk, line 9"
        said.say(LogEvent.ERROR, text, logging.ERROR, exception="RuleException")
        failed = {"jobid": number, "rule_name": "approx", "log": logs, "shellcmd": "a3 approx"}
        said.say(LogEvent.JOB_ERROR, "Error in rule", logging.ERROR, **failed)
    said.say(None, "Exiting because a job execution failed. Look above", logging.ERROR)
    said.say(None, f"Complete log(s): {tmp_path}/all.log")
    text = "WorkflowError:\nAt least one job did not complete successfully."
    said.say(LogEvent.ERROR, text, logging.ERROR, exception="WorkflowError")
    name = "FAILED approx tiny short obs+joint~+dense 0.2 after 3.0 s"
    lines = said.lines()
    assert lines[:2] == [name, f"  the end of {log}:"]
    assert lines[2:22] == [*(f"    line {i}" for i in range(21, 40)), "    a3: error: no space"]
    assert lines[22:26] == [name, "  a3 approx", name, f"  {tmp_path}/empty.log is empty"]
    assert len(lines) == 27
    assert lines[26].startswith(
        "3 jobs failed, 0 of 3 done. Correct what the log says and start again"
    )


def test_a_job_that_is_tried_again_and_succeeds_has_not_failed():
    said = Said()
    said.total(approx=1)
    said.job(1, "approx", COMPRESSED | {"ratio": "0.2"})
    failed = {"jobid": 1, "rule_name": "approx", "log": [], "shellcmd": "a3 approx"}
    said.say(LogEvent.JOB_ERROR, "Error in rule", logging.ERROR, **failed)
    said.job(1, "approx", COMPRESSED | {"ratio": "0.2"})
    said.say(LogEvent.JOB_FINISHED, job_id=1)
    said.say(None, "Complete log(s): /x.log")
    assert said.lines()[-1].startswith("1 job done in ")


def test_a_dry_run_lists_jobs_with_reasons():
    said = Said(dryrun=True, stdout=True, printshellcmds=True)
    said.total(approx=1)
    reason = "Missing output files: a, b; Forced"
    said.job(1, "approx", COMPRESSED | {"ratio": "0.2"}, reason=reason)
    said.job(0, "all", {})
    said.say(None, "This was a dry-run (flag -n). The order")
    said.total(approx=1)
    said.handler.close()
    assert said.lines() == [
        "approx         tiny short obs+joint~+dense 0.2  (missing output files, forced)",
        "    a3 approx",
        "1 job would run; nothing was run",
    ]


@pytest.mark.parametrize(
    ("level", "text", "shown"),
    [
        (logging.INFO, "Building DAG of jobs...", []),
        (logging.INFO, "None", []),
        (logging.DEBUG, "", []),
        (logging.INFO, "Nothing to be done (x).", ["nothing to do: results are up to date"]),
        (logging.INFO, "Terminating processes on user request", None),
        (logging.INFO, "Congratulations, your workflow is in a good condition!", None),
        (logging.WARNING, "The disk is nearly full.", None),
        (logging.ERROR, "Error: Directory cannot be locked.", None),
    ],
)
def test_what_is_not_noise_is_shown(level, text, shown):
    said = Said()
    said.say(None, text, level)
    assert said.lines() == ([text] if shown is None else shown)


def test_an_error_that_is_no_jobs_is_shown_as_it_is():
    said = Said()
    said.say(LogEvent.ERROR, "WorkflowError in file x:\nwrong", logging.ERROR, exception="x")
    assert said.lines() == ["WorkflowError in file x:", "wrong"]


def test_verbose_is_snakemakes_own_text():
    said = Said(verbose=True)
    said.say(None, "Building DAG of jobs...")
    assert said.lines() == ["Building DAG of jobs..."]


def test_a_terminal_has_a_bar_that_names_what_runs_and_goes_away():
    said = Said(Terminal())
    said.total(approx=1, tables=1)
    said.job(1, "approx", COMPRESSED | {"ratio": "0.2"})
    assert "approx tiny short obs+joint~+dense 0.2" in said.stream.getvalue()
    assert "0/2 |" in said.stream.getvalue()
    said.say(LogEvent.JOB_FINISHED, job_id=1)
    said.handler.close()
    last = said.stream.getvalue().rpartition("\n")[2]
    assert "[1/2] approx " in said.stream.getvalue()
    assert last.strip("\r ") == "" or last.endswith("\r")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (125, "2 min 05 s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_profile_of_this_machine_chooses_the_plugin():
    profile = yaml.safe_load((ROOT / "workflow/profiles/default/profile.yaml").read_text())
    assert profile["logger"] == "a3"


def test_the_installed_project_has_the_plugin_where_snakemake_looks(tmp_path):
    """Snakemake lists the path's folders: an editable install by import hooks would be missed."""
    code = (
        "from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry as All\n"
        "assert 'a3' in All().plugins, 'install again: pip install --no-deps -e .'"
    )
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environ, check=True)
