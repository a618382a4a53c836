"""Tiny models built in memory, PEFT twins of them (one patched, one not), and the comparison of what two twins did."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import lora_kernels as lk
from lora_kernels.integrations import peft_layer

warnings.filterwarnings("ignore", category=FutureWarning)

VOCAB = 64


class MLP(nn.Module):
    """Two linear layers, the first with a bias, and a head that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1, self.head = nn.Linear(12, 20), nn.Linear(20, 17, bias=False), nn.Linear(17, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.lin1(torch.tanh(self.lin0(x)))))


def _llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, max_position_embeddings=64, attention_bias=True, **sizes))


def _gpt2() -> nn.Module:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, **off))


def _t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, dropout_rate=0.0, decoder_start_token_id=0, **sizes))


BUILDERS = {"mlp": MLP, "llama": _llama, "gpt2": _gpt2, "t5": _t5}
TARGETS = {"mlp": ["lin0", "lin1"], "llama": "all-linear", "gpt2": ["c_attn", "c_fc"], "t5": ["q", "v", "wi", "wo"]}
TASKS = {"mlp": None, "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
FUSED = {"mlp": 2, "llama": 14, "gpt2": 0, "t5": 20}  # layers that `patch` fuses; GPT-2's Conv1D are PEFT's


@functools.cache
def _base(kind: str) -> nn.Module:
    torch.manual_seed(1)
    return BUILDERS[kind]()


def base(kind: str) -> nn.Module:
    return copy.deepcopy(_base(kind))


def config(kind: str, **options) -> LoraConfig:
    defaults = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[kind], "task_type": TASKS[kind], "init_lora_weights": False}
    return LoraConfig(**(defaults | {"fan_in_fan_out": kind == "gpt2"} | options))


def adapted(kind: str, patched: bool, **options) -> PeftModel:
    """A PEFT model in eval mode; the same weights for the same arguments, whether patched or not."""
    plain = base(kind)
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(plain, config(kind, **options))
    if patched:
        lk.patch(model)
    return model.eval()


def batch(kind: str, rows: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    if kind == "mlp":
        return {"x": torch.randn(rows, 12, generator=g)}
    ids = torch.randint(1, VOCAB, (rows, 7), generator=g)
    return {"input_ids": ids, "labels": ids}


def output(model: nn.Module, kind: str, **extra) -> Tensor:
    """Logits."""
    result = model(**batch(kind), **extra)
    return result if kind == "mlp" else result.logits


def loss(model: nn.Module, kind: str) -> Tensor:
    result = model(**batch(kind))
    return result.square().mean() if kind == "mlp" else result.loss


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_alike(got: object, expected: object, tolerance: float = 1e-5, where: str = "result") -> None:
    """Equal structure and values; tensors within `tolerance`, absolute for values up to 1 and relative to the largest above."""
    assert type(got) is type(expected), f"{where}: {type(got)} and {type(expected)}"
    if isinstance(expected, Tensor):
        assert (got.dtype, got.shape, got.requires_grad) == (expected.dtype, expected.shape, expected.requires_grad), where
        bound = tolerance * max(1.0, expected.double().nan_to_num().abs().max().item()) if expected.numel() else 0.0
        explain = lambda text: f"{where}: {text}"
        torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=bound, equal_nan=True, msg=explain)
    elif isinstance(expected, dict):
        assert list(got) == list(expected), f"{where}: keys"
        for key in expected:
            assert_alike(got[key], expected[key], tolerance, f"{where}[{key}]")
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected), f"{where}: length"
        for i, pair in enumerate(zip(got, expected, strict=True)):
            assert_alike(*pair, tolerance, f"{where}[{i}]")
    else:
        assert got == expected, where


@pytest.fixture(autouse=True)
def one_thread():
    """For models this small, handing work to a second thread costs more than the work, many times more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class CallCount:
    """How many calls of the fused op a block of code made, and why calls went to PEFT."""

    def __init__(self, monkeypatch) -> None:
        self.fused, self.reasons = 0, []
        op, tell = peft_layer.lora_linear, peft_layer._left_to_peft

        def counted(*args):
            self.fused += 1
            return op(*args)

        def told(reason, strict):
            self.reasons.append(reason)
            return tell(reason, strict)

        monkeypatch.setattr(peft_layer, "lora_linear", counted)
        monkeypatch.setattr(peft_layer, "_left_to_peft", told)


def compare(act: Callable, kind: str, *args, **options) -> None:
    """`act(model, kind, *args)` on the unpatched and on the patched twin gives alike results."""
    expected = act(adapted(kind, False, **options), kind, *args)
    assert_alike(act(adapted(kind, True, **options), kind, *args), expected)
