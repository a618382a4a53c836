"""Random sequences of what one does to a PEFT model, on a patched one and on an unpatched twin: after every step both are alike."""

from __future__ import annotations

import copy
import io
import random

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora.layer import Linear, LoraLayer
from peft.utils.hotswap import hotswap_adapter
from peft_models import CallCount, assert_alike, one_thread  # noqa: F401
from torch import Tensor, nn

import lora_kernels as lk

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(15).view(3, 5) * 7 % 16
NAMES = ("default", "a", "b", "c")


class Doubled(nn.Linear):
    """Stands for a quantised base layer: a subclass whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Net(nn.Module):
    """Layers that are fused, layers that never are, and a head tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(16, 12), nn.Conv1d(12, 12, 3, padding=1)
        self.lin0, self.lin1, self.special, self.head = nn.Linear(12, 20), nn.Linear(20, 12, bias=False), Doubled(12, 12), nn.Linear(12, 16)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = torch.tanh(x + self.lin1(F.relu(self.lin0(x), inplace=True)))
        return self.head(torch.tanh(self.special(x)))


PLAIN = {"target_modules": ["lin0", "lin1"]}
CONFIGS = [
    PLAIN | {"r": 4, "lora_alpha": 8},
    PLAIN | {"r": 3, "use_rslora": True, "rank_pattern": {"lin0": 5}, "alpha_pattern": {"lin1": 7}},
    PLAIN | {"r": 2, "lora_dropout": 0.5},
    PLAIN | {"use_dora": True},
    {"target_modules": ["lin0"], "lora_bias": True},
    {"target_modules": ["lin1", "special", "head"], "init_lora_weights": "gaussian"},
    {"target_modules": ["lin0", "table", "conv"]},
    {"target_modules": ["lin1"], "modules_to_save": ["special"], "lora_dropout": 0.3},
]


class Twin:
    """One of the two models, the folder of its files, and the steps that one can take with it."""

    def __init__(self, patched: bool, folder, options: dict):
        torch.manual_seed(0)
        self.patched, self.folder = patched, folder / str(patched)
        self.model = get_peft_model(Net(), LoraConfig(**{"init_lora_weights": False} | options))
        self.patch()

    def patch(self) -> None:
        if self.patched:
            lk.patch(self.model)

    def layers(self, kind=Linear) -> list:
        return [m for m in self.model.modules() if isinstance(m, kind)]

    def output(self) -> Tensor:
        return self.model(IDS)

    # ------------------------------------------------------------------------------------- steps: each takes what `draw` drew

    def add(self, name, other, options, number):
        self.model.add_adapter(name, LoraConfig(**{"init_lora_weights": False} | options))

    def select(self, name, other, options, number):
        self.model.set_adapter(name)

    def select_frozen(self, name, other, options, number):
        self.model.set_adapter(name, inference_mode=True)

    def select_two(self, name, other, options, number):
        self.model.base_model.set_adapter([name, other])

    def delete(self, name, other, options, number):
        self.model.delete_adapter(name)

    def disabled(self, name, other, options, number):
        with self.model.disable_adapter():
            return self.output()

    def switch_off_or_on(self, name, other, options, number):
        (self.model.base_model.disable_adapter_layers if number < 0.5 else self.model.base_model.enable_adapter_layers)()

    def merge(self, name, other, options, number):
        self.model.merge_adapter(None if number < 0.5 else [name], safe_merge=number < 0.3)

    def unmerge(self, name, other, options, number):
        self.model.unmerge_adapter()

    def mixed(self, name, other, options, number):
        return self.model.eval()(IDS, adapter_names=[name, other, "__base__"])

    def rescaled(self, name, other, options, number):
        with rescale_adapter_scale(self.model, number):
            return self.output()

    def scale(self, name, other, options, number):
        for layer in self.layers():
            layer.set_scale(name, number) if number < 0.5 else layer.scale_layer(1 + number)

    def unscale(self, name, other, options, number):
        for layer in self.layers():
            layer.unscale_layer()

    def train_or_eval(self, name, other, options, number):
        self.model.train(number < 0.6)

    def learn(self, name, other, options, number):
        self.model.eval()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        loss = self.output().float().square().mean()
        grads = torch.autograd.grad(loss, parameters, allow_unused=True) if loss.requires_grad else []
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=False):
                if g is not None:
                    p -= 0.1 * g
        return [g for g in grads if g is not None]

    def save_and_load(self, name, other, options, number):
        self.model.save_pretrained(self.folder, selected_adapters=[name])
        path = self.folder if name == "default" else self.folder / name
        self.model.load_adapter(path, other, is_trainable=number < 0.5)

    def hotswap(self, name, other, options, number):
        self.model.save_pretrained(self.folder, selected_adapters=[name])
        hotswap_adapter(self.model, self.folder if name == "default" else self.folder / name, other)

    def weighted(self, name, other, options, number):
        self.model.add_weighted_adapter([name, other], [number, 1 - number], "b", combination_type="cat")

    def dtype(self, name, other, options, number):
        self.model.to((torch.bfloat16, torch.float16, torch.float32, torch.float64)[int(4 * number)])

    def base_dtype(self, name, other, options, number):
        for layer in self.layers():
            layer.base_layer.to(torch.bfloat16 if number < 0.3 else torch.float32)

    def trainable(self, name, other, options, number):
        self.model.set_requires_grad(name, number < 0.5)

    def layer_replaced(self, name, other, options, number):
        inner = self.model.base_model.model
        inner.lin0 = copy.deepcopy(inner.lin0) if number < 0.5 else inner.lin0.get_base_layer()

    def weight_replaced(self, name, other, options, number):
        for layer in self.layers():
            if name in layer.lora_A:
                layer.lora_A[name].weight = nn.Parameter(layer.lora_A[name].weight.detach() * (1 + number))

    def hook(self, name, other, options, number):
        layer = self.layers(LoraLayer)[0]
        handles = [layer.base_layer.register_forward_hook(lambda m, args, y: y + number)]
        try:
            return self.output()
        finally:
            handles[0].remove()

    def copied(self, name, other, options, number):
        if number < 0.5:
            self.model = copy.deepcopy(self.model)
        else:
            file = io.BytesIO()
            torch.save(self.model, file)
            file.seek(0)
            self.model = torch.load(file, weights_only=False)

    def patch_again(self, name, other, options, number):
        if self.patched and number < 0.3:
            lk.unpatch(self.model)
        elif self.patched:
            lk.patch(self.model)

    def state(self) -> dict:
        model: PeftModel = self.model
        layers = [(layer.active_adapters, layer.merged_adapters, layer.scaling, layer.disable_adapters) for layer in self.layers(LoraLayer)]
        return {"adapters": [list(model.peft_config), model.active_adapters, layers], "tensors": model.state_dict()} | {
            "trained": [n for n, p in model.named_parameters() if p.requires_grad]
        }

    def drops(self) -> bool:
        """Whether an output depends on dropout now."""
        return any(
            not layer.disable_adapters and not layer.merged and isinstance(d, nn.Dropout) and d.training
            for layer in self.layers(LoraLayer)
            for d in (layer.lora_dropout[n] for n in layer.active_adapters if n in layer.lora_dropout)
        )


STEPS = [name for name, step in vars(Twin).items() if getattr(step, "__code__", None) and step.__code__.co_argcount == 5]


def outcome(call, *args):
    try:
        return call(*args)
    except Exception as error:  # the same one in both
        return f"{type(error).__name__}: {error}".replace("True", "").replace("False", "")


def drawn(twin: Twin, seed: int) -> list:
    """Whether an output is another one at the next call, and the same one after the same seed; the error where there is one."""
    torch.manual_seed(seed)
    first, second = outcome(twin.output), outcome(twin.output)
    torch.manual_seed(seed)
    again = outcome(twin.output)
    return [torch.equal(first, second), torch.equal(first, again)] if isinstance(first, Tensor) else [first, second, again]


def tolerance(model: nn.Module) -> float:
    return max([1e-5] + [8 * torch.finfo(p.dtype).eps for p in model.parameters() if p.dtype.itemsize == 2])


@pytest.mark.parametrize("seed", range(6))
def test_any_sequence(seed, tmp_path, monkeypatch) -> None:
    draw, calls = random.Random(seed), CallCount(monkeypatch)
    options = CONFIGS[seed % 3]
    plain, patched = Twin(False, tmp_path, options), Twin(True, tmp_path, options)
    done: list = []
    for i in range(40):
        step, args = draw.choice(STEPS), (draw.choice(NAMES), draw.choice(NAMES), draw.choice(CONFIGS), draw.random())
        done.append((step, args))
        where = f"seed {seed}, after {done[-6:]}"
        results = []
        for twin in (plain, patched):
            torch.manual_seed(i)
            results.append(outcome(getattr(twin, step), *args))
        bound = tolerance(plain.model)
        if not plain.drops():
            assert_alike(results[1], results[0], bound, where)
        assert_alike(patched.state(), plain.state(), bound, where)
        if plain.drops():
            assert drawn(patched, i) == drawn(plain, i), where
        else:
            assert_alike(outcome(patched.output), outcome(plain.output), bound, where)
        with torch.no_grad():
            for p, q in zip(patched.model.parameters(), plain.model.parameters(), strict=True):
                p.copy_(q)
    assert calls.fused > 0
