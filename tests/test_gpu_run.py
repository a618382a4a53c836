"""The driver behind `make gpu`, with harmless steps: order, limits, what runs beside what, what is kept and in which archive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_pack  # noqa: E402
import gpu_run  # noqa: E402
import gpu_steps  # noqa: E402
from gpu_steps import Step  # noqa: E402

SANITIZERS = ("memcheck", "racecheck", "synccheck")


def _step(name, code, limit=30, **options):
    return Step(name, [sys.executable, "-c", code], limit, **options)


def _run(step, out, seconds):
    (entry,) = gpu_run.run([step], out, seconds, dict(os.environ))
    return entry


@pytest.fixture
def main(tmp_path, monkeypatch):
    """main(steps, *arguments): the exit status; the archive's content by name."""
    monkeypatch.setattr(gpu_run, "card", lambda: ("Test GPU", "9.0"))

    def call(chain, *arguments):
        monkeypatch.setattr(gpu_run, "steps", lambda *_: chain)
        monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *arguments])
        status = gpu_run.main()
        (archive,) = (tmp_path / "out").iterdir()
        assert archive.name == "gpu-run-test-gpu.tar.gz"
        with tarfile.open(archive) as opened:
            return status, {m.name: opened.extractfile(m).read().decode() for m in opened.getmembers()}

    return call


LOGS = "benchmarks/results/test-gpu/logs"


# ----------------------------------------------------------------------------------------------------------------- the steps


@pytest.fixture
def found(tmp_path, monkeypatch):
    (tmp_path / "a.whl").touch()
    monkeypatch.setattr(gpu_steps.shutil, "which", lambda name: f"/tools/{name}")
    return gpu_steps.steps("python3", tmp_path, tmp_path / "results", tmp_path)


def test_correctness_comes_first_then_targets_then_the_rest(found):
    names = [step.name for step in found]
    order = ["wheels", "build", "native", "cuda-tests", *SANITIZERS, "cuda-forms", "plans", "layers", "batched", "host", "training"]
    assert [name for name in names if name in order] == order
    assert len(set(names)) == len(names)


def test_limits_fit_the_time_of_the_whole(found):
    assert sum(map(gpu_run.limit, gpu_run.groups(found))) + gpu_run.RESERVE <= 8.8 * 60 < 9 * 60


def test_nothing_runs_beside_a_step_that_takes_times(found):
    timed = {"cuda-forms", "plans", "layers", "batched", "passes", "host", "training"}
    for group in gpu_run.groups(found):
        names = {step.name for step in group}
        assert not names & timed or len(names) == 1
    assert {"cuda-tests", "tests", *SANITIZERS} in [{step.name for step in group} for group in gpu_run.groups(found)]


def test_no_network_and_no_virtual_environment(found):
    assert "--no-index" in found[0].command
    assert found[0].command[-1].endswith("a.whl")
    assert not any(word.startswith(("http", "venv")) for step in found for word in step.command)


def test_what_the_steps_name_is_there(found):
    for step in found:
        for word in step.command:
            if word.startswith(("benchmarks/", "tests/")):
                assert (ROOT / word).exists(), word
    tests = gpu_steps.gpu_tests()
    assert {"tests/gpu/test_lora_linear_gpu.py", "tests/gpu/test_batched_gpu.py", "tests/test_pool_gpu.py"} <= set(tests)
    assert gpu_steps.CUDA_TESTS not in tests


def test_sanitizers_check_our_kernels_alone(found):
    for step in found:
        if step.name in SANITIZERS:
            assert step.command[:3] == ["/tools/compute-sanitizer", "--tool", step.name]
            checked = {word.removeprefix("kns=") for word in step.command if word.startswith("kns=")}
            assert {"linear_kernel", "shrink_kernel", "column0_kernel", "update_tma_kernel", "decode_kernel"} <= checked


def test_memcheck_sees_the_end_of_every_tensor(found, tmp_path):
    """It knows what cudaMalloc gave alone, and PyTorch gives many tensors out of one such block."""
    (memcheck,) = (step for step in found if step.name == "memcheck")
    told = Step("told", [sys.executable, "-c", "import os; print(os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'])"], 30, env=memcheck.env)
    assert _run(told, tmp_path, 30)["outcome"] == "ok"
    assert (tmp_path / "told.log").read_text() == "1\n"


def test_a_machine_without_sanitizers_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps.shutil, "which", lambda name: None)
    found = {step.name: step for step in gpu_steps.steps(sys.executable, tmp_path, tmp_path, None)}
    assert not set(SANITIZERS) & set(found)
    assert _run(found["sanitizers"], tmp_path, 30)["outcome"] == "failed (1)"
    assert "compute-sanitizer" in (tmp_path / "sanitizers.log").read_text()


def test_the_steps_options_are_known(tmp_path):
    """Whatever a step runs must at least know its options: each is asked for help, with all of its options before."""
    found = gpu_steps.steps(sys.executable, tmp_path, tmp_path, None)
    asked = [step for step in found if step.name in ("plans-compile", "plans", "layers", "batched", "training", "cuda-forms")]
    options = dict(cwd=ROOT, env=gpu_run.environment(tmp_path, "9.0"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    running = [subprocess.Popen([*(word.format(seconds=1, minutes=1) for word in step.command), "--help"], **options) for step in asked]
    for step, process in zip(asked, running, strict=True):
        text = process.communicate(timeout=120)[0].decode()
        assert process.returncode == 0, f"{step.name}: {text}"


def test_list_runs_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_run, "run", lambda *_: pytest.fail("ran"))
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", "--list", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")])
    assert gpu_run.main() == 0
    text = capsys.readouterr().out
    assert "beside tests" in text
    assert "together at most" in text
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------------------- limits


def test_step_past_its_limit_is_ended_with_all_it_started(tmp_path):
    nap = "import time; time.sleep(60)"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{nap}']); print('up', flush=True); {nap}"
    entry = _run(_step("slow", code), tmp_path, 2.0)
    assert entry["outcome"] == "out of time"
    assert entry["seconds"] < 20
    assert (tmp_path / "slow.log").read_text().startswith("up\n")


@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_pytest_past_its_limit_reports_what_failed(tmp_path, monkeypatch, background):
    """Also from a job in the background, which ignores the signal that ends it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if background else signal.getsignal(signal.SIGINT)
    (tmp_path / "test_it.py").write_text("import time\ndef test_bad(): assert 2 + 2 == 5\ndef test_long(): time.sleep(60)\n")
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path / "test_it.py")]
    try:
        assert _run(Step("late", command, 60), tmp_path, 6.0)["outcome"] == "out of time"
    finally:
        signal.signal(signal.SIGINT, before)
    assert "assert (2 + 2) == 5" in (tmp_path / "late.log").read_text()


TORCH = """
lost = []
def use():
    if lost: raise RuntimeError("CUDA error: an illegal memory access was encountered")
class cuda:
    is_available = is_initialized = lambda: True
    synchronize, memory_reserved = use, lambda: 0
def manual_seed(seed): pass
"""


def _tests(folder, code):
    """Command and environment of tests in a process of their own, with the settings of ours and a stand-in for torch."""
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "torch.py").write_text(TORCH)
    (folder / "test_it.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder / "test_it.py")]
    env = gpu_run.environment(folder, "9.0")
    return command, {name: value for name, value in env.items() if not name.startswith("PYTEST_XDIST")}  # of the worker that we may be in


def test_failures_are_kept_of_workers_that_do_not_hear(tmp_path):
    """As in a compiler or a kernel without end, where Python hears no signal and pytest waits for it until it is killed."""
    command, env = _tests(tmp_path, "def test_bad(): assert 2 + 2 == 5\ndef test_deaf(): sum(range(10**11))\n")
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, start_new_session=True)
    failures, until = tmp_path / "failures.log", time.monotonic() + 120
    try:
        while time.monotonic() < until and not (failures.exists() and "assert (2 + 2) == 5" in failures.read_text()):
            time.sleep(0.1)
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert "test_bad (call)" in failures.read_text()


def test_faults_and_hangs_on_the_gpu_do_not_take_the_other_tests_with_them(tmp_path):
    """A worker whose context is lost, or that waits without end, is replaced; what it was at is reported."""
    command, env = _tests(
        tmp_path,
        """
from torch import lost, use
def test_before(): use()
def test_faults(): lost.append(1), use()
def test_after(): use()
def test_hangs(): sum(range(10**11))
def test_last(): use()
""",
    )
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env | {"LORA_KERNELS_TEST_SECONDS": "3"}, timeout=120)
    assert "3 passed" in run.stdout, run.stdout
    failures = (tmp_path / "failures.log").read_text()
    assert "an illegal memory access" in failures
    assert "crashed while running 'test_it.py::test_hangs'" in failures
    assert "in test_hangs" in failures  # the stack


@pytest.mark.parametrize(
    "code, none_is_fine, outcome", [(0, False, "ok"), (5, True, "nothing to run"), (5, False, "failed (5)"), (1, True, "failed (1)")]
)
def test_outcomes(tmp_path, code, none_is_fine, outcome):
    assert _run(_step("exit", f"raise SystemExit({code})", none_is_fine=none_is_fine), tmp_path, 30)["outcome"] == outcome


def test_steps_beside_each_other_overlap_and_end_apart(tmp_path):
    """The first waits for a file that the second writes; the third is the only one to run out of time."""
    mark = tmp_path / "mark"
    waits = f"import pathlib, time\nwhile not pathlib.Path({str(mark)!r}).exists(): time.sleep(0.01)"
    group = [
        _step("waits", waits),
        _step("writes", f"open({str(mark)!r}, 'w')", beside=True),
        _step("naps", "import time; time.sleep(60)", beside=True),
    ]
    assert gpu_run.groups([_step("alone", ""), *group]) == [[_step("alone", "")], group]
    entries = gpu_run.run(group, tmp_path, 4.0, dict(os.environ))
    assert [entry["outcome"] for entry in entries] == ["ok", "ok", "out of time"]
    assert entries[0]["seconds"] < 4


def test_a_step_gets_what_the_one_before_left_over_and_no_more(main, monkeypatch):
    granted = {}
    honest = gpu_run.run

    def watched(group, out, seconds, env):
        granted[group[0].name] = seconds
        return honest(group, out, seconds, env)

    monkeypatch.setattr(gpu_run, "run", watched)
    main([_step("first", "", limit=20), _step("second", "", limit=10), _step("third", "", limit=5)], "--minutes", f"{(35 + gpu_run.RESERVE) / 60}")
    assert 19 < granted["first"] <= 20.1
    assert 20 < granted["second"] <= 30.1
    assert 20 < granted["third"] <= 35.1


def test_time_is_passed_on_in_the_commands(tmp_path):
    step = Step("told", [sys.executable, "-c", "import sys; print(sys.argv[1:])", "{seconds}", "{minutes}"], 30)
    _run(step, tmp_path, 60 + gpu_run.MARGIN)
    assert (tmp_path / "told.log").read_text() == "['60', '1.00']\n"


# ------------------------------------------------------------------------------------------------------------- what is kept


def test_failure_does_not_stop_the_rest_and_all_is_kept(main, tmp_path, capsys):
    write = f"import pathlib; pathlib.Path({str(tmp_path / 'work' / 'results' / 'linear.json')!r}).write_text('measured')"
    plans = "import os, pathlib; p = pathlib.Path(os.environ['LORA_KERNELS_CACHE']); p.mkdir(); (p / 'test-gpu.json').write_text('plans')"
    status, content = main([_step("first", "raise SystemExit(3)"), _step("second", "print('fine')"), _step("bench", write), _step("plans", plans)])
    assert status == 1
    summary = json.loads(content["benchmarks/results/test-gpu/summary.json"])
    assert [entry["outcome"] for entry in summary["steps"]] == ["failed (3)", "ok", "ok", "ok"]
    assert summary["gpu"] == "Test GPU"
    assert content[f"{LOGS}/second.log"] == "fine\n"
    assert content["benchmarks/results/test-gpu/linear.json"] == "measured"
    assert content["lora_kernels/tuning/configs/test-gpu.json"] == "plans"
    assert "fine" in capsys.readouterr().out


def test_no_step_starts_when_the_time_is_up(main):
    status, content = main([_step("late", "print(1)")], "--minutes", "0.01")
    assert status == 1
    assert json.loads(content["benchmarks/results/test-gpu/summary.json"])["steps"][0]["outcome"] == "not started"
    assert content[f"{LOGS}/late.log"] == "no time left\n"


def test_a_run_that_is_killed_leaves_an_archive_of_the_steps_before(main, tmp_path, monkeypatch):
    honest = gpu_run.run

    def killed(group, *rest):
        if group[0].name == "second":
            raise KeyboardInterrupt
        return honest(group, *rest)

    monkeypatch.setattr(gpu_run, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        main([_step("first", "print('done')"), _step("second", "")])
    with tarfile.open(tmp_path / "out" / "gpu-run-test-gpu.tar.gz") as archive:
        assert archive.extractfile(f"{LOGS}/first.log").read() == b"done\n"


def test_archive_stays_small_and_unpacks_into_a_checkout(tmp_path):
    work = tmp_path / "work"
    (work / "results").mkdir(parents=True)
    for i in range(20):
        (work / f"step{i}.log").write_bytes(os.urandom(2_000_000) + b"the end")
    for i in range(10):
        (work / "results" / f"picture{i}.png").write_bytes(os.urandom(2_000_000))
    (work / "results" / "linear.json").write_text("{}")
    (work / "results" / "linear.part").write_text("half")
    archive = tmp_path / "a.tar.gz"
    assert gpu_pack.pack(work, archive, "Test GPU") == archive.stat().st_size <= gpu_pack.MOST_BYTES
    subprocess.run(["tar", "xzf", archive, "-C", tmp_path], check=True)
    results = tmp_path / "benchmarks" / "results" / "test-gpu"
    assert sorted(p.name for p in results.iterdir()) == ["linear.json", "logs"]
    assert len(list((results / "logs").iterdir())) == 20
    assert (results / "logs" / "step3.log").read_bytes().endswith(b"the end")


def test_names_are_those_that_plans_and_figures_look_for():
    from lora_kernels.tuning import store

    for gpu in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        assert gpu_pack.folder_name(gpu) + ".json" == store.table_name(gpu)
