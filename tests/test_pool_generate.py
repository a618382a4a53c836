"""`AdapterPool` under transformers' generate: token for token what PEFT gives, one adapter at a time."""

from __future__ import annotations

import pytest
import torch
from adapters import KINDS, one_thread, peft_model, save_kinds, tiny_llama

from lora_kernels.serving import AdapterPool

pytest.importorskip("peft")
NAMES = [*KINDS, None]
NEW = 12
__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(base model, adapter folders, left-padded prompts with their mask, PEFT's models by adapter name)."""
    base = tiny_llama()
    folders = save_kinds(base, tmp_path_factory.mktemp("adapters"))
    prompts = torch.randint(2, 128, (len(NAMES), 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(prompts)
    for i in range(len(NAMES)):
        mask[i, : i % 5] = 0  # left padding of another length in every row
    return base, folders, prompts * mask, mask, {name: peft_model(base, f) for name, f in folders.items()} | {None: base}


def generate(model, prompts, mask, **options):
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(input_ids=prompts, attention_mask=mask, **options)


@pytest.mark.parametrize("exact_base", [True, False], ids=["exact-base", "one-op"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "no-cache"])
def test_mixed_batch_gives_pefts_tokens(setting, options, exact_base):
    base, folders, prompts, mask, models = setting
    alone = [generate(models[n], prompts[i : i + 1], mask[i : i + 1], **options)[0] for i, n in enumerate(NAMES)]
    with AdapterPool(base, max_loras=len(KINDS), max_rank=64, exact_base=exact_base) as pool:
        for name, folder in folders.items():
            pool.load(name, folder)
        with pool.batch(NAMES):
            mixed = generate(base, prompts, mask, **options)
    for name, got, expected in zip(NAMES, mixed, alone, strict=True):
        assert got.tolist() == expected.tolist(), f"{name}: other tokens than PEFT"
    assert len({tuple(row.tolist()) for row in mixed[:, -NEW:]}) > len(NAMES) // 2, "the adapters make no difference: the test shows nothing"


@pytest.mark.parametrize("name", KINDS)
def test_logits_of_every_kind_are_pefts(setting, name):
    base, folders, prompts, mask, models = setting
    expected, plain = models[name](input_ids=prompts, attention_mask=mask).logits, base(input_ids=prompts, attention_mask=mask).logits
    with AdapterPool(base, max_loras=1, max_rank=64) as pool:
        pool.load(name, folders[name])
        with pool.batch([name] * len(prompts)):
            got = base(input_ids=prompts, attention_mask=mask).logits
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_sampling_draws_the_same_tokens(setting):
    base, folders, prompts, mask, models = setting
    torch.manual_seed(3)
    expected = generate(models["r4"], prompts, mask, do_sample=True)
    with AdapterPool(base, max_loras=1, max_rank=4) as pool:
        pool.load("r4", folders["r4"])
        torch.manual_seed(3)
        with pool.batch(["r4"] * len(prompts)):
            got = generate(base, prompts, mask, do_sample=True)
    assert torch.equal(got, expected)
