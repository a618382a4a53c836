"""Nothing is served where rows are not the batch's sequences in order."""

from __future__ import annotations

import pytest
import torch
import transformers
from adapters import one_thread, pooled
from torch import nn

from lora_kernels import LoraValueError
from lora_kernels.serving.layers import scattered

__all__ = ["one_thread"]


def test_a_model_that_puts_time_first_is_refused(tmp_path):
    """XLNet turns its input's dimensions: layers see as many "sequences" as there are tokens, here twice the number of names."""
    torch.manual_seed(0)
    model = transformers.XLNetModel(transformers.XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=48, vocab_size=64)).eval()
    with pooled(model, tmp_path, ["layer_1"], target_modules=["layer_1"]) as pool:
        ids = torch.randint(0, 64, (2, 4))
        with pool.batch(["a", "b"]), pytest.raises(LoraValueError, match="time before the sequences"):
            model(ids)
        with pool.batch(["a", "a"]):
            both = model(ids).last_hidden_state
        with pool.batch(["a"]):
            assert torch.equal(model(ids).last_hidden_state, both)


SIZES = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
PARTS = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))}
LED = PARTS | {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64, "attention_window": 4, "d_model": 32, "vocab_size": 64}
FSMT = PARTS | {"src_vocab_size": 64, "tgt_vocab_size": 64, "d_model": 32, "max_position_embeddings": 64}
TIME_FIRST = {  # builder, layers that get [time, sequences, K]
    "xlnet": (lambda: transformers.XLNetModel(transformers.XLNetConfig(d_model=32, n_layer=2, n_head=2, d_inner=48, vocab_size=64)), ["layer_1"]),
    "longformer": (lambda: transformers.LongformerModel(transformers.LongformerConfig(**SIZES, attention_window=4)), ["query"]),
    "led": (lambda: transformers.LEDForConditionalGeneration(transformers.LEDConfig(**LED)), ["query"]),
    "fsmt": (lambda: transformers.FSMTForConditionalGeneration(transformers.FSMTConfig(**FSMT)), ["fc1"]),
}


@pytest.fixture(params=TIME_FIRST)
def time_first(request, tmp_path):
    torch.manual_seed(0)
    build, modules = TIME_FIRST[request.param]
    model = build().eval()
    with pooled(model, tmp_path, modules, target_modules=modules) as pool:
        yield model, pool


def test_as_many_tokens_as_sequences_are_refused(time_first):
    """The inputs' shapes do not tell time from sequences."""
    model, pool = time_first
    with pool.batch(["a", "b", "a", "b"]), pytest.raises(LoraValueError, match="time before the sequences"):
        model(torch.randint(3, 64, (4, 4)))


def test_one_adapter_is_served_where_time_comes_first(time_first):
    """Of three sequences of eight tokens: layers see eight "sequences", which three names do not divide."""
    model, pool = time_first
    ids = torch.randint(3, 64, (3, 8))
    with pool.batch(["a"]):
        expected = [model(row)[0][0] for row in ids.split(1)]
    with pool.batch(["a"] * 3):
        torch.testing.assert_close(model(ids)[0], torch.stack(expected))
    with pool.batch([None] * 3):
        got = model(ids)[0]
    assert torch.equal(got, model(ids)[0])


@pytest.mark.parametrize("length", [4, 6, 8], ids=lambda length: f"{length}-tokens")
def test_generate_refuses_an_encoder_that_puts_time_first(tmp_path, length):
    """It calls the encoder, not the model; LED pads to 4 or 8 tokens, which 2 and 4 names divide."""
    torch.manual_seed(0)
    build, modules = TIME_FIRST["led"]
    model, ids = build().eval(), torch.randint(3, 64, (2, length))
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    with pooled(model, tmp_path, modules, target_modules=modules) as pool:
        with pool.batch(["a", "b"]), pytest.raises(LoraValueError, match="time before the sequences"):
            model.generate(ids, **options)
        with pool.batch(["a"] * 2):
            model.generate(ids, **options)


class TurnedEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lin = nn.Embedding(64, 16), nn.Linear(16, 16)

    def forward(self, input_ids):
        return self.lin(self.embed(input_ids).transpose(0, 1)).transpose(0, 1)


class TurnedModel(nn.Module):
    """An encoder-decoder as transformers' are, of layers of nobody's kind."""

    def __init__(self):
        super().__init__()
        self.config, self.encoder = transformers.PretrainedConfig(is_encoder_decoder=True), TurnedEncoder()

    def get_encoder(self):
        return self.encoder

    def forward(self, input_ids):
        return self.encoder(input_ids=input_ids)


def test_an_encoder_called_for_itself_tells_its_sequences(tmp_path):
    model, ids = TurnedModel().eval(), torch.randint(0, 64, (2, 4))
    with pooled(model, tmp_path, ["lin"]) as pool:
        for call in (model, model.encoder):
            with pool.batch(["a", "b"]), pytest.raises(LoraValueError, match="2 sequences, as the model's input has"):
                call(input_ids=ids)
        with pool.batch(["a", "a"]) as batch:
            model(ids)  # a graph captured here would give the tokens of a mix the wrong adapters
            with pytest.raises(LoraValueError, match="got other rows than its sequences"):
                batch.update_(["a", "b"])


class Unpadded(nn.Module):
    """Takes the padding out first, as GTE does: rows of `lin` are tokens of sequences of any length."""

    def __init__(self):
        super().__init__()
        self.embed, self.lin = nn.Embedding(64, 16), nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask):
        keep = attention_mask.bool()
        out = torch.zeros(*input_ids.shape, 16)
        out[keep] = self.lin(self.embed(input_ids)[keep])
        return out


def test_rows_that_fitted_one_forward_do_not_fit_the_next(tmp_path):
    model, ids = Unpadded().eval(), torch.randint(0, 64, (2, 6))
    even, odd = torch.tensor([[1] * 6] * 2), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    other = pytest.raises(LoraValueError, match="does not fit this forward")
    with pooled(model, tmp_path, ["lin"]) as pool, pool.batch(["a", "b"]):
        model(ids, even)
        with other:
            model(ids, odd)
        model(ids[:, :5], even[:, :5])
        with other:  # ten tokens, as just now
            model(ids, odd)


def test_tokens_of_another_number_of_sequences_are_not_split_by_guess(tmp_path):
    """One sequence, as of packed ones, whose ten tokens two names divide."""
    model, ids, mask = Unpadded().eval(), torch.randint(0, 64, (1, 10)), torch.ones(1, 10)
    with pooled(model, tmp_path, ["lin"]) as pool:
        with pool.batch(["a", "b"]), pytest.raises(LoraValueError, match="1 sequences or a divisor of it, as the model's input has"):
            model(ids, mask)
        with pool.batch(["a", "a"]) as batch:
            model(ids, mask)
            with pytest.raises(LoraValueError, match="got other rows than its sequences"):
                batch.update_(["a", "b"])


def opt() -> nn.Module:
    """Flattens sequences before its fully connected layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, max_position_embeddings=32)).eval()


@pytest.mark.parametrize("call", [lambda m: m.model, lambda m: m.model.forward, lambda m: m.model.decoder], ids=["base-model", "forward", "decoder"])
def test_flat_layers_of_a_part_of_the_model(tmp_path, call):
    model, ids = opt(), torch.randint(3, 64, (2, 5))
    modules = ["q_proj", "fc1"]
    with pooled(model, tmp_path, modules, target_modules=modules) as pool:
        alone = []
        for row, name in zip(ids.split(1), "ab", strict=True):
            with pool.batch([name]):
                alone.append(model.model(row)[0])
        with pool.batch(["a", "b"]):
            torch.testing.assert_close(call(model)(ids)[0], torch.cat(alone))
            assert model.model.decoder.layers[0].fc1(torch.empty(0, 32)).shape == (0, 48)


class Folded(nn.Module):
    """Calls itself on a part of its input, before its own layer."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(16, 16)

    def forward(self, x):
        return self.lin(x.flatten(0, 1)).view(x.shape) + (self(x[:, :1]) if x.shape[1] > 1 else 0)


def test_a_model_that_calls_itself(tmp_path):
    model, x = Folded().eval(), torch.randn(2, 3, 16)
    with pooled(model, tmp_path, ["lin"]) as pool:
        alone = []
        for row, name in zip(x.split(1), "ab", strict=True):
            with pool.batch([name]):
                alone.append(model(row))
        with pool.batch(["a", "b"]):
            torch.testing.assert_close(model(x), torch.cat(alone))


def test_a_batch_remembers_few_shapes(tmp_path):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    with pooled(model, tmp_path, ["0"]) as pool, pool.batch(["a", "b"]) as batch:
        first = model(torch.ones(2, 1, 16))
        for length in range(2, 200):
            model(torch.ones(2, length, 16))
        assert len(batch._metas) == 64
        assert torch.equal(model(torch.ones(2, 1, 16)), first)
        kept = batch.meta(torch.empty(2, 3, 16, device="meta"))  # of another device, whose graphs may use it
        for length in range(2, 200):
            model(torch.ones(2, length, 16))
        assert batch.meta(torch.empty(2, 3, 16, device="meta")) is kept


def test_a_layer_takes_its_input_by_name(tmp_path):
    model, x = nn.Sequential(nn.Linear(16, 16)).eval(), torch.randn(2, 16)
    with pooled(model, tmp_path, ["0"]) as pool, pool.batch(["a", "b"]):
        assert torch.equal(model[0](input=x), model[0](x))


def dia() -> nn.Module:
    """Text to speech whose classifier-free guidance lays the batch without its prompts behind the batch."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48}
    cross = {f"cross_{name}": sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")}
    special = {"pad_token_id": 60, "eos_token_id": 61, "bos_token_id": 62}
    encoder = transformers.DiaEncoderConfig(**sizes, vocab_size=64, max_position_embeddings=64)
    decoder = transformers.DiaDecoderConfig(**sizes, **cross, **special, vocab_size=64, num_channels=2, max_position_embeddings=64)
    parts = {"encoder_config": encoder, "decoder_config": decoder, "delay_pattern": [0, 1], "decoder_start_token_id": 62}
    return transformers.DiaForConditionalGeneration(transformers.DiaConfig(**parts, **special)).eval()


def test_guidance_takes_a_name_for_each_copy(tmp_path):
    model, ids = dia(), torch.randint(1, 60, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False}
    with pooled(model, tmp_path, ["q_proj", "down_proj"]) as pool:
        guided = options | {"guidance_scale": 3.0}
        alone = []
        for row, name in zip(ids.split(1), "ab", strict=True):
            with pool.batch([name]):
                alone.append(model.generate(input_ids=row, attention_mask=torch.ones_like(row), **guided))
        mask = torch.ones_like(ids)
        with pool.batch(["a", "b"]):
            model.generate(input_ids=ids, attention_mask=mask, **options)
            with pytest.raises(LoraValueError, match="copies of the batch behind it"):
                model.generate(input_ids=ids, attention_mask=mask, **guided)
        with pool.batch(["a", "b"] * 2):
            got = model.generate(input_ids=ids, attention_mask=mask, **guided)
        for row, one in zip(got, alone, strict=True):
            assert torch.equal(row[: one.shape[1]], one[0])


def test_a_layer_on_what_all_sequences_share(tmp_path):
    """DeBERTa projects its table of relative positions, one for all sequences: one adapter for all of them, or none, fits."""
    torch.manual_seed(0)
    options = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "share_att_key": True, "position_biased_input": False}
    model = transformers.DebertaV2Model(transformers.DebertaV2Config(**SIZES, **options, type_vocab_size=0)).eval()
    ids = torch.randint(3, 64, (3, 5))
    plain = model(ids).last_hidden_state
    with pooled(model, tmp_path, ["key_proj"]) as pool:
        with pool.batch([None] * 3):
            assert torch.equal(model(ids).last_hidden_state, plain)
        with pool.batch(["a"]):
            expected = torch.cat([model(row).last_hidden_state for row in ids.split(1)])
        with pool.batch(["a"] * 3):
            torch.testing.assert_close(model(ids).last_hidden_state, expected)
        with pool.batch(["a", None, "b"]), pytest.raises(LoraValueError, match="does not fit this forward"):
            model(ids)


class Decoder(nn.Module):
    def __init__(self, batch_first: bool):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)

    def forward(self, x, memory):
        return self.layer(x, memory)


def test_decoder_layers_of_torch_are_served_batch_first_alone(tmp_path):
    torch.manual_seed(0)
    x, memory = torch.randn(2, 4, 16), torch.randn(2, 3, 16)
    first, later = Decoder(True).eval(), Decoder(False).eval()
    later.load_state_dict(first.state_dict())
    modules = ["linear1", "linear2"]
    with pooled(first, tmp_path, modules, target_modules=modules) as pool, pool.batch(["a", "b"]):
        y = first(x, memory)
    with pooled(later, tmp_path, modules, target_modules=modules) as pool:
        with pool.batch(["a", "b"]), pytest.raises(LoraValueError, match="batch_first=False"):
            later(x.transpose(0, 1), memory.transpose(0, 1))
        for row, name in enumerate("ab"):
            with pool.batch([name]):
                turned = later(x.transpose(0, 1), memory.transpose(0, 1)).transpose(0, 1)
            torch.testing.assert_close(turned[row], y[row])


class Routed(nn.Module):
    """Every expert takes the tokens of odd or of even ids, whichever sequence they are of."""

    def __init__(self):
        super().__init__()
        self.embed, self.gate = nn.Embedding(16, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, ids):
        x = self.gate(self.embed(ids))
        y = torch.empty_like(x)
        for i, expert in enumerate(self.experts):
            y[ids % 2 == i] = expert(x[ids % 2 == i])
        return y


def test_a_router_gets_every_token():
    """JetMoE's lies among the experts."""
    assert [*scattered(nn.Module(), ["mlp.experts.0.up", "mlp.experts.router.layer"])] == ["mlp.experts.0.up"]


def test_routed_experts_serve_batches_of_one_adapter(tmp_path):
    torch.manual_seed(0)
    model, ids = Routed().eval(), torch.tensor([[2, 4, 6, 1], [3, 5, 8, 7]])
    with pooled(model, tmp_path / "all", ["gate", "0", "1"]) as pool:
        with pool.batch(["a", "b"]), pytest.raises(LoraValueError, match=r"experts\.0: a routed expert"):
            model(ids)
        with pool.batch(["a"]):
            one = model(ids)
        with pool.batch(["a", "a"]):
            assert torch.equal(model(ids), one)
        with pool.batch(["a", "a"]) as batch:
            batch.update_(["a", "b"])
            with pytest.raises(LoraValueError, match="does not keep them in order"):
                model(ids)
        with pool.batch(["a", "a"]) as batch:
            model(ids)  # a graph captured here would not ask again
            with pytest.raises(LoraValueError, match="got other rows than its sequences"):
                batch.update_(["a", "b"])
    ids_of_one = torch.tensor([[2, 4, 6, 1], [3, 5, 7, 9]])  # three tokens for the first expert, five for the second
    with pooled(model, tmp_path / "one", ["0", "1"]) as pool:
        with pool.batch(["a"]):
            one = model(ids_of_one)
        with pool.batch(["a", "a"]):
            assert torch.equal(model(ids_of_one), one)
        with pool.batch_tokens(["a"] * 8):
            assert torch.equal(model(ids_of_one), one)
        with pool.batch(["b", "b"]) as batch:
            model(ids_of_one)
            with pytest.raises(LoraValueError, match="got other rows than its sequences"):
                batch.update_(["a", "b"])
            batch.update_(["a", "a"])
            assert torch.equal(model(ids_of_one), one)
    with pooled(model, tmp_path / "gate", ["gate"]) as pool:  # experts that no adapter touches are no hindrance
        alone = []
        for row, name in enumerate("ab"):
            with pool.batch([name]):
                alone.append(model(ids[row : row + 1]))
        with pool.batch(["a", "b"]):
            torch.testing.assert_close(model(ids), torch.cat(alone))


def test_one_row_by_its_slot_is_no_mix(tmp_path):
    model, ids = Routed().eval(), torch.tensor([[2, 4, 6, 1]])
    with pooled(model, tmp_path, ["0"]) as pool:
        slots = {name: torch.tensor([pool.slot(name)], dtype=torch.int32) for name in "ab"}
        with pool.batch(["b"]):
            expected = model(ids)
        with pool.batch(slots["a"]) as batch:
            model(ids)
            batch.update_(slots["b"])
            assert torch.equal(model(ids), expected)


def test_what_began_as_a_batch_without_experts_stays_one(tmp_path):
    model, ids = Routed().eval(), torch.tensor([[2, 4, 6, 1], [3, 5, 8, 7]])
    with pooled(model, tmp_path, ["0"]) as pool, pool.batch([None, None]) as batch:
        model(ids)
        with pytest.raises(LoraValueError, match="keep no order of rows"):
            batch.update_(["a", "a"])


def test_a_layer_without_inputs(tmp_path):
    model = nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 3))
    with pooled(model, tmp_path, ["1"]) as pool, pool.batch(["a", "b"]):
        assert model(torch.empty(2, 0)).shape == (2, 3)
