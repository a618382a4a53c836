"""The work: projections of real models, and the grids that `--quick`, the default and `--full` run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

# model -> hidden, intermediate, query width (heads x head size), key/value width (GQA)
MODELS = {
    "smollm2-135m": (576, 1536, 576, 192),
    "llama-3-8b": (4096, 14336, 4096, 1024),
    "qwen3-8b": (4096, 12288, 4096, 1024),
    "llama-3-70b": (8192, 28672, 8192, 1024),
}
RANKS = (8, 16, 64, 128)
TRAIN_TOKENS = (512, 2048, 8192, 16384)
DECODE_TOKENS = (1, 8, 16, 64, 256)
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def projections(model: str) -> dict[str, tuple[int, int]]:
    """Projection -> (K, N). k and v are alike, and so are gate and up."""
    hidden, inter, query, kv = MODELS[model]
    return {"q": (hidden, query), "kv": (hidden, kv), "o": (query, hidden), "gate_up": (hidden, inter), "down": (inter, hidden)}


@dataclass(frozen=True)
class Case:
    """One row of work. mode: "forward" or "forward+backward". L: adapters in the pool; 0 for one adapter outside any pool."""

    model: str
    projection: str
    M: int
    K: int
    N: int
    R: int
    mode: str = "forward+backward"
    dtype: str = "bfloat16"
    dropout: float = 0.0
    L: int = 0

    @property
    def backward(self) -> bool:
        return self.mode == "forward+backward"

    def __str__(self) -> str:
        adapters = f" L{self.L}" if self.L else ""
        drop = f" p{self.dropout:g}" if self.dropout else ""
        return f"{self.model}.{self.projection} {self.mode} {self.dtype} M{self.M} K{self.K} N{self.N} R{self.R}{adapters}{drop}"

    def as_dict(self) -> dict:
        return asdict(self)


def _case(model: str, projection: str, M: int, R: int, **rest) -> Case:
    K, N = projections(model)[projection]
    return Case(model, projection, M, K, N, R, **rest)


def _train(model: str, names: tuple[str, ...], tokens: tuple[int, ...], ranks: tuple[int, ...], **rest) -> list[Case]:
    return [_case(model, name, M, R, **rest) for name in names for R in ranks for M in tokens]


def _decode(model: str, names: tuple[str, ...], tokens: tuple[int, ...], rank: int, most: int = 256) -> list[Case]:
    """Every M with 1, 8 and M adapters."""
    cases = []
    for name in names:
        for M in tokens:
            cases += [_case(model, name, M, rank, mode="forward", L=L) for L in sorted({1, min(8, M), min(M, most)})]
    return cases


def quick() -> tuple[list[Case], list[Case]]:
    """Linear and multi-adapter cases of `--quick`: one projection of SmolLM2-135M, enough for every table and plot."""
    model, name = "smollm2-135m", ("gate_up",)
    linear = _train(model, name, (128, 512, 2048), (16, 64))
    linear += _train(model, name, (512,), (8, 128))
    linear += _train(model, name, (512,), (16,), dropout=0.05)
    linear += _train(model, name, (512,), (16,), dtype="float32")
    linear += _train(model, name, (1, 512), (16,), mode="forward")
    return linear, [_case(model, "gate_up", 16, 16, mode="forward", L=L) for L in (1, 2, 4, 8, 16)]


def cpu() -> tuple[list[Case], list[Case]]:
    """The default on a CPU: all projections of SmolLM2-135M, the smaller ones of Llama-3-8B."""
    small, names = "smollm2-135m", ("q", "kv", "gate_up", "down")
    linear = _train(small, names, (128, 512, 2048), (16, 64))
    linear += _train(small, ("gate_up",), (512,), (8, 128))
    linear += _train(small, names, (512,), (16,), dropout=0.05) + _train(small, names, (512,), (16,), dtype="float32")
    linear += _train(small, names, (1, 16, 512), (16,), mode="forward")
    linear += _train("llama-3-8b", ("q",), (512,), (16,)) + _train("llama-3-8b", ("q",), (1, 16, 512), (16,), mode="forward")
    batched = _decode(small, ("gate_up",), (1, 16, 64), 16)
    batched += [_case(small, "gate_up", 16, 16, mode="forward", L=L) for L in (2, 4)]
    return linear, batched + _decode("llama-3-8b", ("q",), (16,), 16)


def gpu() -> tuple[list[Case], list[Case]]:
    """The default on a GPU, within the nine minutes of `make gpu`: Llama-3-8B in depth, the others sampled. Most wanted cases first."""
    model, linear = "llama-3-8b", []
    for name in ("q", "gate_up", "down"):  # the targets: M = 8192, R = 16 and 64, with and without dropout, both ways and forward alone
        for mode in ("forward+backward", "forward"):
            for dropout in (0.0, 0.05):
                linear += _train(model, (name,), (8192,), (16, 64), mode=mode, dropout=dropout)
    linear += _train(model, ("q",), TRAIN_TOKENS, (16, 64)) + _train(model, ("q",), (8192,), (8, 128))
    linear += _train(model, ("kv", "gate_up", "down"), (2048, 8192), (16,))
    linear += _train(model, ("q", "down"), (2048, 8192), (16,), mode="forward")
    linear += _train("llama-3-70b", ("q", "kv"), (8192,), (16, 64)) + _train("qwen3-8b", ("gate_up",), (8192,), (16,))
    linear += _train("smollm2-135m", ("gate_up",), (8192,), (16,))
    batched = [_case(model, "q", 64, 16, mode="forward", L=L) for L in (1, 2, 4, 8, 16, 32, 64)]
    return list(dict.fromkeys(linear)), list(dict.fromkeys(batched + _decode(model, ("q", "gate_up"), DECODE_TOKENS, 16)))


def full() -> tuple[list[Case], list[Case]]:
    """Every model, projection, rank, token count, dropout and mode. Hours on a GPU; not meant for a CPU."""
    linear = [
        case
        for model in MODELS
        for mode in ("forward", "forward+backward")
        for dropout in (0.0, 0.05)
        for case in _train(model, tuple(projections(model)), TRAIN_TOKENS, RANKS, mode=mode, dropout=dropout)
    ]
    return linear, [case for model in MODELS for R in RANKS for case in _decode(model, tuple(projections(model)), DECODE_TOKENS, R)]


def sized(sizes: list[tuple[int, int]], tokens: tuple[int, ...], ranks: tuple[int, ...], dtypes: tuple[str, ...]) -> tuple[list[Case], list[Case]]:
    """Layers [(K, N)] of no model: forward and both ways; and forward with 8 and 64 adapters for up to 256 rows, as in a decode step."""
    forward = [Case("layer", f"{K}x{N}", M, K, N, R, "forward", dtype) for dtype in dtypes for K, N in sizes for R in ranks for M in tokens]
    batched = [replace(case, L=L) for L in (8, 64) for case in forward if case.M <= 256]
    return forward + [replace(case, mode="forward+backward") for case in forward], batched


def in_float32(cases: list[Case]) -> list[Case]:
    """A grid for a device whose PyTorch has no fast 16-bit product: bfloat16 and float32 change places, and what is now bfloat16 is small."""
    turned = (replace(case, dtype="float32") if case.dtype == "bfloat16" else replace(case, dtype="bfloat16", M=min(case.M, 64)) for case in cases)
    return list(dict.fromkeys(turned))
