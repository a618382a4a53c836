"""The end-to-end suite on a model small enough for a test: who is measured, what is recorded, who is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lora_kernels._console import console
from lora_kernels.bench import provenance, records, report, steps

pytest.importorskip("peft")
pytest.importorskip("transformers")

TINY = steps.Model("tiny", hidden=64, inter=96, heads=4, kv_heads=2, layers=1, tokens=12, R=4, steps=3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def record():
    return steps.measure(TINY, CPU)


def test_all_are_measured_and_agree(record):
    results = record["results"]
    assert list(results) == ["peft", "peft_low", "ours", "ours_low"]
    for entry in results.values():
        assert "refused" not in entry
        assert entry["rounds"] == TINY.steps
        assert entry["tokens_per_s"] == pytest.approx(1e6 * TINY.tokens / entry["us"])
    assert results["ours"]["last_loss"] == pytest.approx(results["peft"]["last_loss"], rel=2e-2)
    assert results["ours_low"]["last_loss"] == pytest.approx(results["peft_low"]["last_loss"], rel=2e-2)


def test_memory_is_recorded(record):
    """PEFT keeps fp32 copies of what the fused op keeps once."""
    results = record["results"]
    assert results["ours"]["saved_bytes"] < results["peft"]["saved_bytes"]
    assert all(entry["peak_bytes"] > 0 for entry in results.values())


def test_models_differ_only_in_how_layers_run():
    made = steps.models(TINY, CPU)
    state = {name: {k: v.float() for k, v in model.state_dict().items()} for name, model in made.items()}
    for name in ("peft_low", "ours", "ours_low"):
        assert state[name].keys() == state["peft"].keys()
        for key, value in state["peft"].items():
            torch.testing.assert_close(state[name][key], value, rtol=1e-2, atol=1e-3)
    assert all(p.dtype == torch.float32 for n, p in made["ours"].named_parameters() if "lora_" in n)
    assert all(p.dtype == torch.bfloat16 for n, p in made["ours_low"].named_parameters() if "lora_" in n)


def test_in_float32_there_is_one_model_each():
    made = steps.models(dataclasses.replace(TINY, dtype="float32"), CPU)
    assert list(made) == ["peft", "ours"]
    verdicts = steps.gate(TINY, made, steps._batch(TINY, CPU, 0))
    assert all(refused is None for refused, _ in verdicts.values())


def test_wrong_gradients_are_refused(monkeypatch):
    def models(spec, device):
        made = build(spec, device)
        for name, module in made["ours"].named_modules():
            if name.endswith("q_proj"):
                module.scaling["default"] *= 1.5
        return made

    build = steps.models
    monkeypatch.setattr(steps, "models", models)
    results = steps.measure(TINY, CPU)["results"]
    assert "wrong" in results["ours"]["refused"]
    assert "us" not in results["ours"]
    assert results["ours_low"]["us"] > 0


def test_record_is_written_and_printed(record, tmp_path, capsys):
    writer = records.Writer(tmp_path, "steps", provenance.collect(torch.device("cpu")), {})
    writer.add(record)
    report.print_record(console(), "steps", records.read(tmp_path / "steps.json")["records"][0])
    text = capsys.readouterr().out
    assert "tokens/s" in text
    assert "ours_low" in text
