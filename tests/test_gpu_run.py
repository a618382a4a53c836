"""The driver behind `make gpu`, with harmless steps: limits, order, what is kept."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def driver():
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "benchmarks" / "gpu_run.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_run"] = module
    spec.loader.exec_module(module)
    return module


def _step(driver, name, code, **options):
    return driver.Step(name, [sys.executable, "-c", code], options.pop("limit", 30), **options)


def test_steps_in_order_and_within_nine_minutes(driver, tmp_path):
    (tmp_path / "a.whl").touch()
    found = driver.steps("python3", tmp_path, tmp_path, 3.5)
    names = [s.name for s in found if s.name not in ("memcheck", "racecheck")]
    assert names == ["wheels", "build", "native", "env", "tests", "cuda-tests", "cuda-forms", "bench"]
    assert "--no-index" in found[0].command
    assert found[0].command[-1].endswith("a.whl")
    assert not any(word.startswith(("http", "venv")) for s in found for word in s.command)


def test_step_past_its_limit_is_ended_with_all_it_started(driver, tmp_path):
    nap = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{nap}']); print('up', flush=True); {nap}"
    entry = driver.run(_step(driver, "slow", code), tmp_path, 2.0, dict(os.environ))
    assert entry["outcome"] == "out of time"
    assert entry["seconds"] < 20
    assert (tmp_path / "slow.log").read_text().startswith("up\n")


def test_pytest_past_its_limit_reports_what_failed(driver, tmp_path):
    (tmp_path / "test_it.py").write_text("import time\ndef test_bad(): assert 2 + 2 == 5\ndef test_long(): time.sleep(60)\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path / "test_it.py")]
    entry = driver.run(driver.Step("late", command, 30), tmp_path, 6.0, {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})
    assert entry["outcome"] == "out of time"
    assert "assert (2 + 2) == 5" in (tmp_path / "late.log").read_text()


@pytest.mark.parametrize(
    "code, none_is_fine, outcome", [(0, False, "ok"), (5, True, "nothing to run"), (5, False, "failed (5)"), (1, True, "failed (1)")]
)
def test_outcomes(driver, tmp_path, code, none_is_fine, outcome):
    step = _step(driver, "exit", f"raise SystemExit({code})", none_is_fine=none_is_fine)
    assert driver.run(step, tmp_path, 30, dict(os.environ))["outcome"] == outcome


def test_failure_does_not_stop_the_rest_and_all_is_kept(driver, tmp_path, monkeypatch, capsys):
    chain = [_step(driver, "first", "raise SystemExit(3)"), _step(driver, "second", "print('fine')")]
    monkeypatch.setattr(driver, "steps", lambda *_: chain)
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--out", str(tmp_path)])
    assert driver.main() == 1
    assert [e["outcome"] for e in json.loads((tmp_path / "summary.json").read_text())] == ["failed (3)", "ok"]
    assert "fine" in capsys.readouterr().out


def test_no_step_starts_when_the_time_is_up(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "steps", lambda *_: [_step(driver, "late", "print(1)")])
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--out", str(tmp_path), "--minutes", "0.01"])
    assert driver.main() == 1
    assert json.loads((tmp_path / "summary.json").read_text())[0]["outcome"] == "not started"
