"""Run PEFT's own tests with every LoRA linear layer fused and with none, and show the tests whose outcome differs.

    python tests/peft_suite.py PEFT_CHECKOUT [pytest arguments, e.g. tests/test_custom_models.py -k lora]

PEFT_CHECKOUT is a clone of huggingface/peft at the installed version; only its tests are used, the installed peft is what they test.
Exits with 1 when an outcome differs. Tests that need a download fail alike in both runs.
"""

from __future__ import annotations

import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path

OUTCOMES, FUSE = "PEFT_SUITE_OUTCOMES", "PEFT_SUITE_FUSE"  # environment: file to write; "1" to fuse

# ------------------------------------------------------------------------------------------------ the plugin in the pytest process

_outcomes: dict[str, str] = {}
_fused_calls = 0


def _fuse_every_new_layer() -> None:
    from peft.tuners.lora import layer as peft_layers
    from peft.tuners.lora import model as peft_model

    from lora_kernels.integrations import peft, peft_layer

    create, op = peft_layers.dispatch_default, peft_layer.lora_linear

    def create_fused(*args, **kwargs):
        layer = create(*args, **kwargs)
        if type(layer) is peft_layers.Linear and peft_layer.never_plain(layer) is None:
            peft._swap(layer, "auto", False)
        return layer

    def counted(*args):
        global _fused_calls
        _fused_calls += 1
        return op(*args)

    peft_layers.dispatch_default = peft_model.dispatch_default = create_fused
    peft_layer.lora_linear = counted


def _stand_in(name: str) -> None:
    """An empty module for an import at the top of PEFT's test helpers."""
    module = types.ModuleType(name)
    module.__spec__, module.__version__ = importlib.machinery.ModuleSpec(name, None), "0"
    module.StableDiffusionPipeline = module.UNet2DConditionModel = type(None)
    sys.modules[name] = module


def pytest_configure(config) -> None:
    import peft  # noqa: F401  (before the stand-in, which it must not see)

    if importlib.util.find_spec("diffusers") is None:
        _stand_in("diffusers")
    if os.environ[FUSE] == "1":
        _fuse_every_new_layer()


def pytest_runtest_logreport(report) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    Path(os.environ[OUTCOMES]).write_text(json.dumps({"outcomes": _outcomes, "fused calls": _fused_calls}))


# -------------------------------------------------------------------------------------------------------------------- the command


def run(checkout: Path, arguments: list[str], fuse: bool, folder: Path) -> dict:
    here, file = Path(__file__).resolve(), folder / f"{fuse}.json"
    path = os.pathsep.join([str(here.parent), str(here.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, OUTCOMES: str(file), FUSE: str(int(fuse)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", here.stem, "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    done = subprocess.run([*command, *arguments], cwd=checkout, env=env, capture_output=True, text=True, check=False)
    if not file.exists():
        sys.exit(f"peft_suite: pytest did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(file.read_text())


def main(checkout: str, *arguments: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        plain, fused = (run(Path(checkout), list(arguments), fuse, Path(folder)) for fuse in (False, True))
    names = sorted(plain["outcomes"].keys() | fused["outcomes"].keys())
    pairs = {name: (plain["outcomes"].get(name), fused["outcomes"].get(name)) for name in names}
    for (before, after), count in sorted(Counter(pairs.values()).items(), key=str):
        print(f"{count:6d}  unpatched: {before}, patched: {after}")
    print(f"{fused['fused calls']:6d}  calls of the fused op in the patched run")
    different = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    for name, (before, after) in different.items():
        print(f"DIFFERS {name}: {before} -> {after}")
    return 1 if different or not fused["fused calls"] else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
