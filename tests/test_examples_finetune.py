"""examples/finetune.py on a tiny model: the whole way, that a fault is found, and everything that can be wrong with its input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import finetune  # noqa: E402
import text  # noqa: E402
import tiny_llama  # noqa: E402
import training  # noqa: E402

import lora_kernels as lk  # noqa: E402


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_llama.save(tmp_path_factory.mktemp("tiny"), hidden=32)


@pytest.fixture
def run(tiny, tmp_path):
    def call(*argv: str, out: Path = tmp_path / "out") -> int:
        small = ["--steps", "4", "--compare-steps", "3", "--batch", "2", "--seq", "16", "--held-out", "4", "--r", "4", "--device", "cpu"]
        return finetune.main(["--model", str(tiny), "--out", str(out), *small, *argv])

    return call


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whole_way(run, tmp_path, capsys, dtype):
    out = tmp_path / "deep" / "out"
    for _ in range(2 if dtype == "float32" else 1):  # a second run replaces the first one's files
        assert run("--dtype", dtype, out=out) == 0
    assert sorted(p.name for p in out.iterdir()) == ["adapter", "finetune.json", "finetune.png"]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (out / "adapter").iterdir()}
    found = json.loads((out / "finetune.json").read_text())
    assert found["train"]["patched"] == 14
    assert found["train"]["reload_same_bits"]
    assert len(found["train"]["loss"]) == 4
    assert len(found["compare"]["loss"]["patched"]) == 3
    assert found["train"]["loss"][0] == pytest.approx(found["compare"]["loss"]["patched"][0], rel=1e-3)  # B = 0: dropout changes nothing yet
    ours, naive = (sum(r["saved_bytes"] for r in found["layers"] if r["name"] == name) for name in ("lora_kernels", "PyTorch"))
    assert ours < naive
    assert "perplexity" in capsys.readouterr().out


def test_held_out_perplexity_falls(run, tmp_path):
    line = "the quick brown fox jumps over the lazy dog {} times\n\n"
    (tmp_path / "fox.txt").write_text("".join(line.format(i) for i in range(400)))
    assert run("--data", str(tmp_path / "fox.txt"), "--steps", "30", "--lr", "0.01", "--seq", "32") == 0
    found = json.loads((tmp_path / "out" / "finetune.json").read_text())["train"]
    assert found["perplexity_after"] < 0.9 * found["perplexity_before"]


def test_a_wrong_patch_is_found(run, tmp_path, monkeypatch, capsys):
    patch = lk.patch

    def faulty(model):
        report = patch(model)
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = {name: 1.02 * s for name, s in module.scaling.items()}
        return report

    monkeypatch.setattr(lk, "patch", faulty)
    assert run("--lr", "0.01", "--compare-steps", "4") == 1
    assert "loss curves differ" in capsys.readouterr().out


def write(tmp_path: Path, name: str, content: bytes) -> str:
    (tmp_path / name).write_bytes(content)
    return str(tmp_path / name)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("empty.txt", b"", "no text"),
        ("blank.txt", b" \n\n\t\n", "no text"),
        ("latin.txt", "caf\xe9 ".encode("latin-1") * 500, "byte 3 is not UTF-8"),
        ("short.txt", b"three words only", "too short"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": ', "line 2"),
        ("keys.jsonl", b'{"body": "no text"}\n', "line 1"),
        ("list.jsonl", b"[1, 2]\n", "line 1"),
        ("nothing.jsonl", b"\n\n", "no text"),
        ("table.csv", b"a,b\n", "nor a .txt or .jsonl file"),
    ],
)
def test_bad_data_is_one_line_and_writes_nothing(run, tmp_path, capsys, name, content, says):
    assert run("--data", write(tmp_path, name, content)) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--data", "absent.txt"], "No such file"),
        (["--model", "no-such-org/no-such-model"], "cannot be loaded"),
        (["--model", "/no/such/model"], "--model /no/such/model: there is no such folder or file"),
        (["--model", "./model.gguf"], "there is no such folder or file"),
        (["--targets", "q_proj,c_attn"], "no linear module named c_attn"),
        (["--targets", ","], "it has: down_proj"),
    ],
    ids=["no-file", "no-model", "no-folder", "no-gguf", "no-target", "empty-targets"],
)
def test_bad_arguments_are_one_line_and_write_nothing(run, tmp_path, capsys, argv, says):
    assert run(*argv) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "argv", [["--r", "0"], ["--dropout", "1"], ["--steps", "-3"], ["--alpha", "0"], ["--lr", "inf"], ["--dtype", "int8"]], ids=" ".join
)
def test_bad_numbers_are_refused_before_anything_is_loaded(argv):
    with pytest.raises(SystemExit) as stop:
        finetune.main(argv)
    assert stop.value.code == 2


def test_unusable_environment_is_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LORA_KERNELS_BACKEND", "tpu")
    assert run() == 2
    assert "LORA_KERNELS_BACKEND names no backend" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_damaged_model_folder(tiny, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.gguf").write_bytes(b"GGUF" + bytes(40))
    assert finetune.main(["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_unwritable_output(run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run(out=tmp_path / "file") == 2
    assert run(out=tmp_path / "file" / "below") == 2
    assert capsys.readouterr().err.count("cannot be written") == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_is_no_adapter_is_left_alone(run, tmp_path, capsys):
    mine = tmp_path / "out" / "adapter"
    mine.mkdir(parents=True)
    (mine / "plug.txt").write_text("mine")
    assert run() == 2
    assert "no PEFT adapter" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["adapter", "plug.txt"]


@pytest.mark.parametrize("when", ["train", "compare"])
def test_ctrl_c_leaves_earlier_results_alone(run, tmp_path, monkeypatch, capsys, when):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "finetune.json").write_text("earlier")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, when, interrupted)
    assert run() == 130
    assert "interrupted" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in (tmp_path / "out").iterdir()] == [("finetune.json", "earlier")]


def test_split_shares_no_paragraph():
    documents = text.python_reference()
    train, held_out = text.split(documents, held_out=0.1, seed=0)
    shared = {" ".join(p.split()) for p in train.split("\n\n")} & {" ".join(p.split()) for p in held_out.split("\n\n")}
    assert not shared
    assert 0.09 < len(held_out) / (len(train) + len(held_out)) < 0.13


def test_jsonl_forms(tmp_path):
    rows = [{"text": "one"}, {"prompt": "two", "completion": "three"}, {"messages": [{"role": "user", "content": "four"}, {"content": "five"}]}]
    path = write(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, rows)).encode("utf-8-sig"))
    assert text.read_documents(path) == ["one", "two\nthree", "four\nfive"]
