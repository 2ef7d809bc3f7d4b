"""A step of LoRA training against the same pass without gradients of any weight.

Rank 16 on all linear layers of two Hyena and two attention layers of the 7B's width, every activation kept. Both sides
compute the gradient of the loss with respect to the first layer's input, as every layer but the first of a deeper model
has to. The LoRA step also computes the gradients of A and B and updates them (AdamW).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.gpu.session import GpuSession
from benchmarks.registry import IncorrectError, Row, Step, Summary, Target, pairwise, require_equal
from hyaena import adapters
from hyaena.adapters import LoRALinear
from hyaena.bench.clock import Side, take_turns
from hyaena.bench.run import random_model
from hyaena.model import StripedHyena
from hyaena.ops import Dense, lora_linear

RANK = 16
MOST = 1.1
"""The LoRA step's time over that of the pass without gradients of weights."""


def lora(session: GpuSession) -> Iterator[Step]:
    """The layers by themselves, then the step."""
    session.forget_model()
    yield Step("a layer with a LoRA update is right", functools.partial(check, session))
    yield Step("LoRA step", functools.partial(step, session))


def check(session: GpuSession) -> Iterator[Row]:
    """Output and gradients of every shape of layer, against the equation in float32.

    Raises:
        IncorrectError: one differs by more than rounding to 8 bits explains.
    """
    config, tolerance = session.sizes.training_config, 0.02 if session.dtype == torch.bfloat16 else 1e-4
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {tuple(m.weight.shape) for m in StripedHyena(config).modules() if isinstance(m, nn.Linear)}
    for rows, columns in sorted(shapes):
        make = functools.partial(torch.randn, device=session.device)
        x, dy = (make(session.sizes.lora_length, n).to(session.dtype) for n in (columns, rows))
        layer = Dense((make(rows, columns) * columns**-0.5).to(session.dtype))
        a, b = make(RANK, columns) * columns**-0.5, make(rows, RANK)
        leaves = [t.requires_grad_() for t in (x, a, b)]
        y = lora_linear(x, layer, a, b, 0.5)
        got = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
        wide = [t.detach().float().requires_grad_() for t in leaves]
        y = nn.functional.linear(wide[0], layer.weight.float() + 0.5 * wide[2] @ wide[1])
        expected = [y.detach(), *torch.autograd.grad(y, wide, dy.float())]
        for name, value, want in zip(("y", "dx", "dA", "dB"), got, expected, strict=True):
            require_equal(f"{name} of a LoRA layer {rows} x {columns}", value.float(), want, tolerance)
    return iter(())


def step(session: GpuSession) -> Iterator[Row]:
    """The two sides in turns."""
    frozen, adapted, composed = (_model(session) for _ in range(3))
    for model in (adapted, composed):
        adapters.add_adapter(model, rank=RANK)
    _compose(composed)
    ids = torch.randint(frozen.config.vocab_size, (1, session.sizes.lora_length), device=session.device)
    with torch.no_grad():
        require_equal("logits of an adapter that is zero", adapted(ids).float(), frozen(ids).float(), 0.02)
    sides = {
        "frozen": functools.partial(passes, session, frozen, ids, None),
        "lora": functools.partial(passes, session, adapted, ids, _optimizer(adapted)),
        "composed": functools.partial(passes, session, composed, ids, _optimizer(composed)),
    }
    losses = [sides["lora"]() for _ in range(3)]  # compiles, too
    for name in ("frozen", "composed"):
        sides[name]()
    if not losses[-1] < losses[0]:
        raise IncorrectError(f"three LoRA steps did not lower the loss: {losses}")
    seconds = take_turns({name: Side(run) for name, run in sides.items()}, session.sizes.lora_rounds)
    what = (
        f"LoRA step, rank {RANK}, T {ids.shape[1]:,}, two Hyena and two attention layers, D {frozen.config.hidden_size}"
    )
    for name, words, target in (
        ("lora", "", Target("<=", MOST)),
        ("composed", ", the update as two more linear layers", None),
    ):
        yield Row(
            what=what + words,
            unit="s",
            ours=Summary.of(seconds[name].values),
            baseline_name="forward and backward without gradients of weights",
            baseline=Summary.of(seconds["frozen"].values),
            ratio=pairwise(seconds[name].values, seconds["frozen"].values),
            ratio_name="ours / baseline",
            target=target,
            note="With the optimizer's step; both sides compute the gradient of the first layer's input.",
        )


def _model(session: GpuSession) -> StripedHyena:
    """Random frozen weights, the same each time; the embedding's output is a leaf with a gradient."""
    torch.manual_seed(0)
    model = random_model(session.sizes.training_config, session.device, session.dtype).requires_grad_(False)
    model.embed_tokens.register_forward_hook(lambda _module, _args, x: x.requires_grad_(torch.is_grad_enabled()))
    return model


def _compose(model: StripedHyena) -> None:
    """Compute updates as adapters usually do: ``layer(x) + scale·linear(linear(x, A), B)``."""

    def forward(module: LoRALinear, x: Tensor) -> Tensor:
        linear = nn.functional.linear
        low = linear(x, module.lora_A.to(x.dtype))
        return module.base_layer(x) + module.scale * linear(low, module.lora_B.to(x.dtype))

    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.forward = functools.partial(forward, module)


def _optimizer(model: StripedHyena) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-3, fused=trained[0].is_cuda)


def passes(session: GpuSession, model: StripedHyena, ids: Tensor, optimizer: torch.optim.Optimizer | None) -> float:
    """Forward, backward and, with an optimizer, its step; the loss. Waits for the device."""
    loss = nn.functional.cross_entropy(model(ids)[0, :-1].float(), ids[0, 1:])
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    session.synchronize()
    return float(loss.detach())
