"""`lora-kernels`: what it prints, what it returns, and that `check` can fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_kernels
from lora_kernels import _env, _selfcheck, cli, reference, testing
from lora_kernels._errors import LoraValueError
from lora_kernels.ops import _registry, _serving_path
from lora_kernels.ops import lora_linear as lora_linear_op


def test_env_names_every_backend_op_and_remedy(capsys):
    assert cli.main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["backends"]) == set(_registry.PROVIDERS)
    assert set(facts["ops"]) == set(reference.OPS)
    assert facts["backends"]["reference"]["usable"]
    for entry in facts["backends"].values():
        assert entry["usable"] or (entry["why"] and entry["fix"])
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text  # no terminal, no colours
    for name in (*reference.OPS, torch.__version__):
        assert name in text


def test_env_shows_every_variable_that_is_set_and_what_is_wrong_with_it(monkeypatch, capsys, tmp_path):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    documented = set(re.findall(r"`(LORA_KERNELS_\w+)`", readme))
    assert documented <= set(_env.KNOWN)
    for name in documented:
        monkeypatch.setenv(name, "1")
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "tpu")
    monkeypatch.setenv("LORA_KERNELS_CACHE", str(tmp_path / "file"))
    monkeypatch.setenv("LORA_KERNELS_STRCIT", "1")
    assert cli.main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert documented | {"LORA_KERNELS_STRCIT"} <= facts["variables"].keys()
    assert "names no backend" in facts["remarks"]["LORA_KERNELS_BACKEND"]
    assert "allowed: a folder" in facts["remarks"]["LORA_KERNELS_CACHE"]
    assert "LORA_KERNELS_STRICT" in facts["remarks"]["LORA_KERNELS_STRCIT"]
    assert "LORA_KERNELS_STRICT" not in facts["remarks"]
    assert cli.main(["env"]) == 0
    assert "names no backend" in " ".join(capsys.readouterr().out.split())


def test_env_shows_a_folder_that_cannot_be_looked_at(monkeypatch, capsys):
    monkeypatch.setenv("LORA_KERNELS_CACHE", "x" * 300)
    assert cli.main(["env", "--json"]) == 0
    assert "File name too long" in json.loads(capsys.readouterr().out)["remarks"]["LORA_KERNELS_CACHE"]


def test_env_names_the_instruction_sets_when_a_wrong_one_is_asked_for():
    """In a process of its own: the engine looks once."""
    if isinstance(provider := _registry.provider("cpu"), str):
        pytest.skip(provider)
    env = os.environ | {"LORA_KERNELS_CPU_ISA": "avx1024"}
    done = subprocess.run([sys.executable, "-m", "lora_kernels", "env", "--json"], env=env, capture_output=True, text=True)
    facts = json.loads(done.stdout)
    for said in (facts["backends"]["cpu"]["why"], facts["remarks"]["LORA_KERNELS_CPU_ISA"]):
        assert "got 'avx1024'; allowed: " in said
        assert "portable" in said
    assert facts["backends"]["cpu"]["fix"] == "unset it or name one of these"


def test_env_advises_no_compiler_where_a_gpu_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _env.backends()["cuda"]["fix"] == _env.gpu_missing()[1]


def test_env_knows_the_backend_that_the_environment_names(monkeypatch):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "reference")
    assert {chosen["cpu"] for chosen in _env.ops().values()} == {"reference"}


def test_env_picks_what_the_registry_would_run():
    x = torch.zeros(4, 8)
    args = (x, torch.zeros(8, 8), None, torch.zeros(2, 8), torch.zeros(8, 2), 1.0, 0.0, None)
    run = _registry.select("lora_linear_fwd", "auto", False, "cpu", args)
    assert _registry.provider(_env.ops()["lora_linear_fwd"]["cpu"]).OPS["lora_linear_fwd"][0] is run


def test_check_passes_on_every_usable_backend(capsys):
    assert cli.main(["check", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    ran = [r for r in found["results"] if r["refused"] is None]
    assert {r["tensor"] for r in ran} == {"y", "dx", "dA", "dB", "h"}
    assert found["unchecked"] == _selfcheck.unchecked() == []
    assert all(0 <= r["ratio"] <= testing.ALLOWED_RATIO for r in ran)


def serve(monkeypatch, ops):
    """Let the reference backend offer these ops, to calls of known signatures too."""
    monkeypatch.setattr(_registry.provider("reference"), "OPS", ops)
    monkeypatch.setattr(lora_linear_op, "_forward_runs", {})
    monkeypatch.setattr(lora_linear_op, "_backward_runs", {})
    monkeypatch.setattr(_serving_path, "_runs", {})


@pytest.mark.parametrize("fault", ["y", "dx", "dA", "dB", "nan"])
def test_check_fails_on_a_wrong_backend(monkeypatch, capsys, fault):
    def fwd(*args):
        y, h, mask = reference.lora_linear_fwd(*args)
        return (y * 1.02 if fault == "y" else y * float("nan") if fault == "nan" else y), h, mask

    def bwd(*args):
        grads = dict(zip(("dx", "dA", "dB"), reference.lora_linear_bwd(*args), strict=True))
        return tuple(g * 1.02 if name == fault else g for name, g in grads.items())

    ops = {"lora_linear_fwd": (fwd, lambda *_: None), "lora_linear_bwd": (bwd, lambda *_: None)}
    serve(monkeypatch, {**reference.OPS, **ops})
    monkeypatch.setattr(_selfcheck, "SHAPES", [(37, 83, 131, 5)])
    monkeypatch.setattr(_selfcheck, "CHECKS", {"lora_linear": _selfcheck.CHECKS["lora_linear"]})
    assert cli.main(["check", "--backend", "reference", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert f"FAILED lora_linear on reference/cpu: {'y' if fault == 'nan' else fault}" in out


@pytest.mark.parametrize("op, fault", [("lora_shrink", "h"), ("lora_expand", "y")])
def test_check_fails_on_a_wrong_half(monkeypatch, op, fault):
    run = reference.OPS[op][0]

    def wrong(t, *rest):
        out = run(t, *rest)
        return t.mul_(1.02) if out is None else out * 1.02

    serve(monkeypatch, {**reference.OPS, op: (wrong, lambda *_: None)})
    results, _ = _selfcheck.check(op, "reference", "cpu")
    assert {r.tensor for r in results} == {fault}
    assert not all(r.ok for r in results)


def test_check_tells_a_refusal_from_a_failure(monkeypatch, capsys):
    takes_no_fp16 = {name: (run, lambda t, *_: "no fp16" if t.dtype == torch.float16 else None) for name, (run, _) in reference.OPS.items()}
    serve(monkeypatch, takes_no_fp16)
    monkeypatch.setattr(_selfcheck, "SHAPES", [(5, 7, 9, 2)])
    monkeypatch.setattr(_selfcheck, "targets", lambda: iter([("lora_linear", "reference", "cpu")]))
    assert cli.main(["check"]) == 0
    out = capsys.readouterr().out
    assert "no fp16" in out
    assert "not run" in out


@pytest.mark.parametrize(
    "argv, code, says",
    [
        (["check", "--device", "cuda"], 2, "nothing to check, "),
        (["check", "--backend", "triton"], 2, "fix: "),
    ],
    ids=["no-such-device", "no-such-backend"],
)
def test_what_cannot_be_done_is_said_in_one_line(monkeypatch, capsys, argv, code, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(argv) == code
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("raised, code", [(LoraValueError("bad thing"), 2), (KeyboardInterrupt(), 130)], ids=["error", "ctrl-c"])
def test_errors_and_ctrl_c_give_a_line_and_a_code(monkeypatch, capsys, raised, code):
    def fail():
        raise raised

    monkeypatch.setattr(_env, "collect", fail)
    assert cli.main(["env"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_closed_output_is_no_failure():
    """`lora-kernels env >&-`, as some daemons start their children."""
    closing = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-m', 'lora_kernels', 'env'])"
    done = subprocess.run([sys.executable, "-c", closing], stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_that_has_no_such_letters():
    show = "from lora_kernels import _console, _env, cli; _env.collect = lambda: _console.console().print('µ → ×') or {}; cli.main(['env', '--json'])"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", show], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[0], done.stderr) == (0, "? ? ?", "")


def test_what_the_allocator_refuses_is_said_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(_env, "collect", lambda: torch.empty(2**60))
    assert cli.main(["env"]) == 2
    err = capsys.readouterr().err
    assert "out of memory; got " in err
    assert err.count("\n") == 1


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"lora-kernels {lora_kernels.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["fly"], ["env", "--nope"], ["check", "--backend", "tpu"]], ids=" ".join)
def test_bad_arguments_exit_with_2(argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2


def test_the_rest_of_the_line_reaches_the_module(monkeypatch, tmp_path):
    (tmp_path / "lk_cli_probe.py").write_text("def main(argv):\n    return len(argv)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(cli.ELSEWHERE, "bench", "lk_cli_probe")
    assert cli.main(["bench", "--model", "x", "-v"]) == 3


def test_error_ratio():
    exact = torch.randn(1000, dtype=torch.float64)
    rounded = exact.to(torch.bfloat16)
    assert 0 < testing.error_ratio(rounded, rounded, exact) < 1
    assert testing.error_ratio(rounded * 1.05, rounded, exact) > 2
    assert testing.error_ratio(torch.full_like(rounded, float("nan")), rounded, exact) == float("inf")
    assert testing.error_ratio(rounded[:0], rounded[:0], exact[:0]) == 0
    with pytest.raises(ValueError, match="do not belong together"):
        testing.error_ratio(rounded.float(), rounded, exact)


def test_saved_bytes_counts_each_storage_once_and_no_weights():
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True)
    assert testing.saved_bytes(lambda: (x @ w.t()) + (x @ w.t()), [w]) == x.nbytes
    assert testing.saved_bytes(lambda: x @ w.t()) == x.nbytes + w.nbytes


def test_dropout_mask_is_the_one_the_op_uses():
    import lora_kernels as lk

    M, K, p = 9, 45, 0.3
    x = torch.randn(M, K)
    y = lk.lora_linear(x, torch.zeros(K, K), None, torch.eye(K), torch.eye(K), dropout_p=p, seed=11)
    keep = testing.dropout_mask(11, M, K, p)
    assert 0 < keep.sum() < keep.numel()
    torch.testing.assert_close(y, x * keep * testing.keep_scale(p))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5, 1e-5])
def test_kept_elements_are_scaled_by_the_rate_that_is_drawn(p):
    """So the expectation of mask times scale is 1 exactly; that of 1 / (1 - p) is not."""
    kept = 65536 - reference.drop_threshold(p)
    assert testing.keep_scale(p) * kept / 65536 == pytest.approx(1, abs=2e-16)
    assert abs(1 / testing.keep_scale(p) - (1 - p)) <= 2**-17 + 1e-12


def test_timer_calls_everything_equally_often():
    calls: list[str] = []
    times = testing.time_interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    assert sorted(calls) == ["a"] * 4 + ["b"] * 4
    assert testing.ratio([1.0, 4.0, 9.0], [2.0, 2.0, 3.0]) == 2.0
