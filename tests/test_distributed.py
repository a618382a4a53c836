"""FSDP2 and DTensor on two gloo ranks: the same numbers as on one, and whether the fused path ran."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "distributed_worker.py"
TOLERANCE = 1e-5


def two_ranks(folder: Path, wanted: str) -> dict:
    start = lambda rank: subprocess.Popen(
        [sys.executable, WORKER, str(rank), "2", folder / "rendezvous", wanted], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    ranks = [start(0), start(1)]
    try:
        outputs = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs[0][1] + outputs[1][1]
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    return two_ranks(tmp_path_factory.mktemp("ranks"), "all")


@pytest.mark.parametrize("units, fused", [("decoder layers", True), ("LoRA layers", True), ("adapters", False)])
def test_fsdp2_trains_as_one_process(found, units, fused):
    """Adapters that are FSDP units of their own run PEFT's forward, which gathers them; 14 layers, two steps."""
    result = found[f"fsdp {units}"]
    assert (result["fused"], result["peft"]) == ((28, 0) if fused else (0, 28))
    assert result["same_names"]
    assert result["gap"] < TOLERANCE


def test_fsdp2_of_compiled_decoder_layers_trains_as_one_process(found):
    result = found["fsdp compiled decoder layers"]
    assert result["same_names"]
    assert result["gap"] < TOLERANCE


@pytest.mark.slow
def test_fsdp2_of_decoder_layers_compiled_by_inductor(tmp_path):
    result = two_ranks(tmp_path, "inductor")
    assert result["same_names"]
    assert result["gap"] < TOLERANCE


@pytest.mark.parametrize("column", [False, True], ids=["replicate", "column"])
def test_ranks_share_the_drawn_seed_of_dropout(found, column):
    """Each rank's own would give every rank another mask, and replicated adapters other gradients."""
    assert found[f"drawn seed column={column}"] < TOLERANCE


PLACEMENTS = {"replicate": "R", "column": "S(1)", "row": "P(sum)", "token": "S(0)", "odd one": None}


@pytest.mark.parametrize("dropout_p", [0.0, 0.4], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", PLACEMENTS)
def test_op_on_dtensors_equals_the_op_on_full_tensors(found, layout, bias, dropout_p):
    result = found[f"op {layout} bias={bias} dropout={dropout_p}"]
    assert result["gap"] < TOLERANCE
    if not dropout_p and PLACEMENTS[layout]:  # with dropout, DTensor may first redistribute
        assert result["y"] == PLACEMENTS[layout]
