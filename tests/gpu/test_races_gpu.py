"""What goes wrong now and then on a GPU: races, memory that nobody wrote, streams, graphs, strides, a second device.

Skips itself without a CUDA device. Run: PYTHONPATH=src python -m pytest tests/gpu -n 8 --dist loadgroup -q
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.kernels.loss import SparseTargetTensors, linear_sparse_loss, sparse_loss, token_statistics
from tests.gpu import place
from tests.gpu.place import BACKEND, DEVICE, Found, size

pytestmark = place.marks
TOKENS, VOCAB = size(1024, 40), size(50257, 501)
COUNTS = (64, 1, 0, 17, 30)
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 2.0},
    "cap": {"soft_cap": 8.0},
    "label": {"missing_mass": "label"},
    "jsd": {"divergence": "jsd"},
    "weights": {},
}
BUSY = size(200_000_000, 0)  # cycles, about 0.1 s


def inputs_of(mode: str, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, dict[str, Any]]:
    """Raw logits and the options of a call."""
    raw = (torch.randn(TOKENS, VOCAB, device=DEVICE, generator=place.generator(seed)) * 3).to(dtype)
    targets = place.targets_of(TOKENS, VOCAB, COUNTS, period=29)
    labels = place.labels_of(TOKENS, VOCAB, targets, seed)
    options = {"alpha": 0.6, "ce_weight": 0.3, "z_loss": 1e-3, "targets": targets, "labels": labels, **MODES[mode]}
    if mode == "weights":
        options["token_weights"] = (torch.arange(TOKENS, device=DEVICE) % 4) * 0.5
    return raw, options


def linear_of(mode: str, seed: int) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """Hidden states, head and bias, and the options of a call of several chunks that asks the device nothing."""
    random = place.generator(seed)
    num_tokens = size(700, 40)
    hidden = torch.randn(num_tokens, 64, device=DEVICE, generator=random).bfloat16()
    weight = (torch.randn(VOCAB, 64, device=DEVICE, generator=random) * 0.3).bfloat16()
    bias = torch.randn(VOCAB, device=DEVICE, generator=random).bfloat16()
    targets = place.targets_of(num_tokens, VOCAB, COUNTS)
    options = {"alpha": 0.6, "targets": targets, "labels": place.labels_of(num_tokens, VOCAB, targets), **MODES[mode]}
    options["chunk_bytes"] = size(256, 16) * VOCAB * 2
    if mode == "weights":
        options["token_weights"] = (torch.arange(num_tokens, device=DEVICE) % 4) * 0.5
        options["num_active"] = num_tokens - -(-num_tokens // 4)
    return (hidden, weight, bias), options


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("mode", list(MODES))
def test_many_rows_again_and_again(mode: str, seed: int) -> None:
    """A step that overtakes another shows in some rows of some calls: right once, and then the same bits each time."""
    raw, options = inputs_of(mode, seed)
    first = place.check_from_logits(raw, **options)
    for _ in range(size(6, 1)):
        place.assert_same_bits(place.from_logits(raw, backend=BACKEND, **options), first)


@pytest.mark.parametrize("mode", list(MODES))
def test_chunks_from_hidden_states_again_and_again(mode: str) -> None:
    inputs, options = linear_of(mode, 3)
    first = place.from_hidden(*inputs, backend=BACKEND, **options)
    for _ in range(size(4, 1)):
        place.assert_same_bits(place.from_hidden(*inputs, backend=BACKEND, **options), first)


@pytest.mark.parametrize("mode", list(MODES))
def test_memory_that_held_nan_before(mode: str) -> None:
    """Every value that comes back was written: memory full of NaN gives what memory full of 0 gives."""
    raw, options = few_rows(mode, 4)
    place.assert_same_bits(*place.twice(lambda: place.from_logits(raw, backend=BACKEND, **options)))
    inputs, options = linear_of(mode, 4)
    place.assert_same_bits(*place.twice(lambda: place.from_hidden(*inputs, backend=BACKEND, **options)))


def test_statistics_in_memory_that_held_nan_before() -> None:
    (hidden, weight, bias), options = linear_of("plain", 5)
    del options["alpha"]

    def call() -> Found:
        found = token_statistics(hidden=hidden, weight=weight, bias=bias, backend=BACKEND, **options)
        return Found(found.entropy.sum(), (found.label_logprob, found.divergence), found.student_mass)

    place.assert_same_bits(*place.twice(call))


def few_rows(mode: str, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """The first rows of inputs_of."""
    raw, options = inputs_of(mode, seed)
    cut = torch.arange(size(256, 16))
    options["targets"] = options["targets"].to("cpu").select(cut).to(DEVICE)
    for name in ("labels", "token_weights"):
        if name in options:
            options[name] = options[name][: len(cut)]
    return raw[: len(cut)], options


@place.only_on_a_gpu
def test_a_stream_of_its_own() -> None:
    """Work goes to the stream that is current: it is done when that is, however long the default stream is busy."""
    raw, options = few_rows("plain", 6)
    inputs, linear = linear_of("weights", 6)
    linear["normalizer"] = torch.ones((), device=DEVICE)

    def call() -> tuple[Found, Found]:
        return place.from_logits(raw, backend=BACKEND, **options), place.from_hidden(*inputs, backend=BACKEND, **linear)

    want, other = call(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        call()  # takes the memory that this stream needs: asking the driver for it could wait for all streams
    torch.cuda.synchronize()
    default = torch.cuda.current_stream()
    torch.cuda._sleep(20 * BUSY)
    with torch.cuda.stream(other):
        logits, hidden = (
            Found(found.loss.cpu(), tuple(x.cpu() for x in found.grads), found.sums.cpu()) for found in call()
        )
    assert not default.query(), "the default stream was not busy for long enough: the test saw nothing"
    torch.cuda.synchronize()
    on_host = [Found(x.loss.cpu(), tuple(grad.cpu() for grad in x.grads), x.sums.cpu()) for x in want]
    place.assert_same_bits(logits, on_host[0])
    place.assert_rows_close(hidden, on_host[1], 2e-2)  # the products of another stream may add up in another order


def step_of(inputs: tuple[Tensor, ...], raw: Tensor, linear: dict[str, Any], logits: dict[str, Any]) -> list[Tensor]:
    """Losses, sums and gradients of one call of each kind."""
    leaves = [x.detach().requires_grad_() for x in (*inputs, raw)]
    loss, sums = linear_sparse_loss(hidden=leaves[0], weight=leaves[1], bias=leaves[2], **linear)
    other, more = sparse_loss(logits=leaves[3], **logits)
    grads = torch.autograd.grad(loss + other, leaves)
    return [loss.detach(), other.detach(), sums.stack(), more.stack(), *grads]


@pytest.mark.parametrize("mode", ["plain", "temperature", "weights"])
def test_a_cuda_graph_replays_what_the_call_gives(mode: str) -> None:
    """Captured once, replayed on other values: nothing of the call is decided on the host by values of the device."""
    inputs, linear = linear_of(mode, 7)
    raw, logits = few_rows(mode, 7)
    if mode == "weights":
        logits["num_active"] = len(raw) - len(raw) // 4
    for options in (linear, logits):
        options |= {"backend": BACKEND, "normalizer": torch.full((), 3.0, device=DEVICE)}
    fresh = [torch.randn_like(value) for value in (*inputs, raw)]
    want = step_of((fresh[0], fresh[1], fresh[2]), fresh[3], linear, logits)
    if place.ON_CPU:
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step_of(inputs, raw, linear, logits)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step_of(inputs, raw, linear, logits)
    for value, new in zip((*inputs, raw), fresh, strict=True):
        value.copy_(new)
    for _ in range(2):
        for value in found:
            value.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for number, (value, expected) in enumerate(zip(found, want, strict=True)):
            if number in (1, 3, 7):  # of the call from logits
                assert torch.equal(value, expected), number
            else:  # the products of a graph may add up in another order
                assert float((value - expected).norm()) <= 1e-2 * float(expected.norm()), number


def with_strides(targets: SparseTargetTensors) -> SparseTargetTensors:
    """The same targets; every column has its values at every second place of its memory."""
    return targets.each(lambda axis, value: place.strided(value), offsets=place.strided(targets.offsets))


@pytest.mark.parametrize("mode", ["plain", "temperature", "label", "weights"])
def test_columns_and_vectors_with_strides(mode: str) -> None:
    raw, options = inputs_of(mode, 8)
    options["kd_weights"] = 0.5 + (torch.arange(TOKENS, device=DEVICE) % 3).float()
    want = place.from_logits(raw, backend=BACKEND, **options)
    options |= {"targets": with_strides(options["targets"])}
    for name in ("labels", "kd_weights", "token_weights"):
        if name in options:
            options[name] = place.strided(options[name])
            assert not options[name].is_contiguous()
    place.assert_same_bits(place.from_logits(raw, backend=BACKEND, **options), want)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", ["wide rows", "not at 16 bytes", "turned", "every second column", "one row for all"])
def test_logits_with_strides(layout: str, inplace: bool) -> None:
    raw, options = few_rows("plain", 9)
    if layout == "one row for all":
        if inplace:
            pytest.skip("rows that share their memory cannot each be overwritten")
        view = raw[:1].expand(raw.shape)
        raw = view.contiguous()
    elif layout == "turned":
        view = raw.t().contiguous().t()
    elif layout == "every second column":
        view = place.strided(raw, 100.0)
    else:
        first = 64 if layout == "wide rows" else 3
        wide = torch.full((raw.shape[0], raw.shape[1] + 131), 100.0, dtype=raw.dtype, device=DEVICE)
        view = wide[:, first : first + raw.shape[1]]
        view.copy_(raw)
    want = place.from_logits(raw, backend=BACKEND, **options)
    assert torch.equal(view, raw) and not view.is_contiguous()
    got = place.from_logits(view, backend=BACKEND, inplace=inplace, **options)
    if layout == "one row for all":
        # Rows of an odd length do not begin at 16 bytes, and a row for all does: compiled apart, they add up in another
        # order.
        place.assert_close(got, want, raw.dtype)
    else:
        place.assert_same_bits(got, want)
    if layout in ("wide rows", "not at 16 bytes"):
        beside = torch.cat([wide[:, :first], wide[:, first + raw.shape[1] :]], 1)
        assert bool((beside == 100.0).all()), "something was written beside the logits"


@pytest.mark.parametrize("mode", ["plain", "weights"])
def test_hidden_states_and_head_with_strides(mode: str) -> None:
    inputs, options = linear_of(mode, 10)
    want = place.from_hidden(*inputs, backend=BACKEND, **options)
    hidden, weight, bias = inputs
    layouts = (
        (hidden.t().contiguous().t(), weight.t().contiguous().t(), place.strided(bias)),
        (
            torch.cat([hidden, hidden], 1)[:, : hidden.shape[1]],
            torch.cat([weight, weight], 1)[:, : weight.shape[1]],
            bias,
        ),
    )
    for other in layouts:
        assert all(torch.equal(a, b) for a, b in zip(inputs, other, strict=True))
        # Another layout may take another matrix product, whose sums differ in their last bits.
        place.assert_rows_close(place.from_hidden(*other, backend=BACKEND, **options), want, 2e-2)


@place.only_on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("mode", ["plain", "temperature", "weights"])
def test_a_device_that_is_not_the_current_one(mode: str) -> None:
    """Tensors of a second GPU while the first is current: launched there, and the same bits."""
    raw, options = inputs_of(mode, 11)
    want = place.from_logits(raw, backend=BACKEND, **options)
    moved = {name: value.to("cuda:1") if hasattr(value, "to") else value for name, value in options.items()}
    assert torch.cuda.current_device() == 0
    found = place.from_logits(raw.to("cuda:1"), backend=BACKEND, **moved)
    assert found.grads[0].device.index == 1 and torch.cuda.current_device() == 0
    assert torch.equal(found.grads[0].cpu(), want.grads[0].cpu()) and torch.equal(found.sums.cpu(), want.sums.cpu())
