"""The kernels on CPU tensors, against float64. Collected by test_kernels_interpreted.py, which see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from convinit.kernels import configs, launch
from convinit.kernels.configs import Config
from convinit.kernels.tensor_views import split_packed
from convinit.ops import tune, verify
from convinit.ops.positional_attention import positional_attention_reference
from convinit.ops.shared_attention import shared_attention_reference

ALL = (True, True, True, True, True)  # which of q, k, v, q_pos, k_pos need gradients
NAMES = ("q", "k", "v", "q_pos", "k_pos")


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """`empty` gives NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def tiles(size, tokens=0):
    """Square tiles of all kernels; those that take all keys at once only if `tokens` says that they fit."""
    names = set(configs.KERNELS) - (set() if 0 < tokens <= size else {"backward", "apply"})
    return dict.fromkeys(names, Config(size, size, 4, 1))


def problem(tokens, rank, dtype, *, batch=2, heads=2, q_pos=True, k_pos=True, seed=0):
    """q, k, v as views of one packed product, position terms as views of another, and dout."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    q, k, v = draw(batch, tokens, 3, heads, rank).permute(2, 0, 3, 1, 4)
    positions = draw(tokens, 2, heads, rank).permute(1, 2, 0, 3)
    dout = draw(batch, tokens, heads * rank)
    return (q, k, v, positions[0] if q_pos else None, positions[1] if k_pos else None), dout


def differentiate(f, inputs, dout, dtype):
    """Value and gradients of a reference, in the given dtype."""
    inputs = [None if x is None else x.detach().to(dtype).requires_grad_() for x in inputs]
    out = f(*inputs)
    out.backward(dout.to(dtype))
    return [out.detach(), *(None if x is None else x.grad for x in inputs)]


def assert_as_good_as_eager(ours, eager, exact, factor=2.0, more=0.0):
    """Errors, in norm, within a small multiple of what the formula itself makes of the dtype.

    `more` is a relative error beside it.
    """
    assert len(ours) == len(eager) == len(exact)
    for name, a, b, c in zip(("out", *NAMES), ours, eager, exact, strict=False):
        assert (a is None) == (c is None), name
        if a is None:
            continue
        assert a.shape == c.shape and a.dtype == b.dtype, name
        limit = factor * (b.double() - c).norm() + (4 * torch.finfo(a.dtype).eps + more) * c.norm()
        assert (a.double() - c).norm() <= limit, name


def check(inputs, dout, chosen, *, scale, alpha, factor=2.0, more=0.0):
    needs = [x is not None for x in inputs]
    out, lse = launch.positional_forward(*inputs, scale, alpha, chosen)
    ours = [out, *launch.positional_backward(dout, *inputs, out, lse, scale, alpha, needs, chosen=chosen)]

    def reference(*inputs):
        return positional_attention_reference(*inputs, scale=scale, alpha=alpha)

    eager = differentiate(reference, inputs, dout, out.dtype)
    exact = differentiate(reference, inputs, dout, torch.float64)
    if inputs[0].shape[2] == 1:  # dq and dk of a single token are 0; everybody returns rounding errors
        for name, a in zip(NAMES, ours[1:], strict=True):
            assert a is None or name == "v" or a.abs().max() <= 100 * torch.finfo(a.dtype).eps, name
        keep = (0, 3)
        ours, eager, exact = ([results[i] for i in keep] for results in (ours, eager, exact))
    assert_as_good_as_eager(ours, eager, exact, factor, more)


@pytest.mark.parametrize(
    ("tokens", "rank", "dtype", "positions", "tile_size"),
    [
        # all keys in one tile
        (1, 8, torch.float32, (True, True), 16),
        (17, 48, torch.float16, (True, False), 32),
        (17, 32, torch.float32, (False, False), 32),
        (64, 32, torch.float32, (True, True), 64),
        (65, 16, torch.float16, (True, True), 128),
        (196, 64, torch.float16, (True, True), 256),
        (197, 64, torch.float32, (False, True), 256),
        (256, 64, torch.float16, (False, False), 256),
        # several tiles
        (64, 80, torch.float16, (True, True), 32),
        (65, 32, torch.float32, (True, True), 64),
        (197, 32, torch.float32, (True, False), 128),
        (257, 32, torch.float16, (True, True), 128),
        (257, 96, torch.float32, (True, True), 128),
    ],
)
def test_positional_attention(tokens, rank, dtype, positions, tile_size):
    q_pos, k_pos = positions
    inputs, dout = problem(tokens, rank, dtype, q_pos=q_pos, k_pos=k_pos)
    check(inputs, dout, tiles(tile_size, tokens), scale=rank**-0.5, alpha=0.4)


@pytest.mark.parametrize(
    ("tokens", "rank"),
    [(49, 32), (64, 64), (65, 64), (128, 32), (197, 32), (197, 64), (256, 64), (272, 32)],
)
def test_committed_configurations(tokens, rank):
    inputs, dout = problem(tokens, rank, torch.float16, batch=1, heads=1)
    check(inputs, dout, None, scale=rank**-0.5, alpha=0.4)


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_position_gradients_do_not_depend_on_the_content_share(alpha, dtype, monkeypatch):
    """They are sums of dq = α dQ, which says nothing of dQ where α is 0, and little where α is small."""
    monkeypatch.setattr(launch, "IMAGES", 4)
    inputs, dout = problem(33, 16, dtype, batch=5, heads=1)  # more images than the sum takes a step
    check(inputs, dout, tiles(64, 33), scale=0.25, alpha=alpha)
    check(inputs, dout, tiles(32), scale=0.25, alpha=alpha)


def test_position_gradients_of_more_images_than_a_step():
    inputs, dout = problem(16, 16, torch.float16, batch=launch.IMAGES + 5, heads=1)
    check(inputs, dout, tiles(16, 16), scale=0.25, alpha=0.5)


@pytest.mark.parametrize("tile_size", [16, 64])
def test_gradient_of_a_packed_product_is_written_in_place(tile_size):
    inputs, dout = problem(20, 16, torch.float32)
    chosen = tiles(tile_size, 20)
    out, lse = launch.positional_forward(*inputs, 0.25, 0.5, chosen)
    arguments = (dout, *inputs, out, lse, 0.25, 0.5, ALL)
    packed = torch.empty(2, 20, 3 * 2 * 16)
    parts = split_packed(packed, 2)
    found = launch.positional_backward(*arguments, parts, chosen)
    expected = launch.positional_backward(*arguments, chosen=chosen)
    for ours, theirs in zip((*parts, *found[3:]), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not packed.isnan().any()


@pytest.mark.parametrize(("scale", "alpha", "positions"), [(0.0, 0.5, True), (0.3, 0.0, False)])
@pytest.mark.parametrize("tile_size", [16, 64])
def test_logits_of_zero(tile_size, scale, alpha, positions):
    """Padded keys stay masked: −∞ times 0 is no number."""
    inputs, dout = problem(17, 16, torch.float32, q_pos=False, k_pos=positions)
    check(inputs, dout, tiles(tile_size, 17), scale=scale, alpha=alpha)


def test_views_beyond_32_bits_are_copied(monkeypatch):
    """[N, B, C] memory of a large batch: the offsets of a head's tokens do not fit."""
    far = torch.empty_strided((1, 1, 3, 16), (16, 16, 2**30, 1), device="meta")
    assert launch.reachable(far).is_contiguous()
    seen = set()
    monkeypatch.setattr(launch, "reachable", lambda x: seen.add(None if x is None else x.data_ptr()) or x)
    inputs, dout = problem(20, 16, torch.float32)
    chosen = tiles(16)
    out, lse = launch.positional_forward(*inputs, 0.25, 0.5, chosen)
    assert seen == {x.data_ptr() for x in inputs}
    launch.positional_backward(dout, *inputs, out, lse, 0.25, 0.5, ALL, chosen=chosen)
    assert seen == {x.data_ptr() for x in (*inputs, dout)}
    seen.clear()
    launch.map_gradient(dout, inputs[2], chosen)
    assert seen == {dout.data_ptr(), inputs[2].data_ptr()}


@pytest.mark.parametrize("tile_size", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sharp_logits(dtype, tile_size):
    """Logits up to about 1e4 in size: most rows are one-hot, some are near ties.

    The backward makes the logits again and knows P through a log-sum-exp of that size, both rounded to
    float32: where they are an ulp apart, P is off by as much. Eager saves P itself.
    """
    inputs, dout = problem(64, 32, dtype)
    ulp = torch.finfo(torch.float32).eps * 1e4
    check(inputs, dout, tiles(tile_size, 64), scale=350.0, alpha=1.0, factor=6.0, more=2 * ulp)


@pytest.mark.parametrize("tile_size", [32, 64])
def test_one_hot_map_copies_values(tile_size):
    """Position terms alone: row n looks at token target[n] and at no other."""
    tokens = 40
    (_, _, v, _, _), _ = problem(tokens, 64, torch.float32)
    target = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    k_pos = torch.eye(tokens, 64).expand(2, -1, -1)  # an expanded view: its head stride is 0
    content = torch.zeros_like(v)
    for sign in (1, -1):
        arguments = (content, content, v, k_pos[:, target], sign * k_pos, sign * 1e4, 0.0)
        out, _ = launch.positional_forward(*arguments, tiles(tile_size))
        assert torch.equal(out.unflatten(-1, (2, 64)).transpose(1, 2), v[:, :, target])


@pytest.mark.parametrize("tile_size", [16, 32])
@pytest.mark.parametrize("wanted", ["q", "k", "v", "q_pos", "k_pos"])
def test_one_gradient_alone(wanted, tile_size):
    inputs, dout = problem(20, 16, torch.float32, batch=1)
    chosen = tiles(tile_size, 20)
    out, lse = launch.positional_forward(*inputs, 0.3, 0.5, chosen)
    arguments = (dout, *inputs, out, lse, 0.3, 0.5)
    every = launch.positional_backward(*arguments, ALL, chosen=chosen)
    alone = launch.positional_backward(*arguments, [name == wanted for name in NAMES], chosen=chosen)
    for name, a, b in zip(NAMES, alone, every, strict=True):
        assert torch.equal(a, b) if name == wanted else a is None


@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0)])
def test_nothing_to_do(batch, tokens):
    inputs, dout = problem(tokens, 8, torch.float32, batch=batch)
    out, lse = launch.positional_forward(*inputs, 1.0, 1.0)
    gradients = launch.positional_backward(dout, *inputs, out, lse, 1.0, 1.0, ALL)
    for x, gradient in zip(inputs, gradients, strict=True):
        assert gradient.shape == x.shape and not gradient.any()
    assert launch.apply_map(torch.ones(2, tokens, tokens), inputs[2]).shape == out.shape
    assert not launch.map_gradient(dout, inputs[2]).any()


@pytest.mark.parametrize(
    ("batch", "tokens", "rank", "dtype", "tile_size", "sharpness"),
    [
        (3, 1, 8, torch.float32, 16, 1.0),
        (5, 17, 48, torch.float16, 32, 1.0),
        (3, 64, 32, torch.float32, 64, 1e3),
        (2, 65, 16, torch.float16, 32, 1e3),
        (2, 196, 64, torch.float32, 64, 1.0),
        (9, 60, 16, torch.float16, 64, 1.0),  # more images than programs
        (2, 197, 64, torch.float16, 256, 1.0),
        (2, 256, 32, torch.float32, 256, 1.0),
        (2, 257, 32, torch.float16, 128, 1e3),
    ],
)
def test_shared_attention(batch, tokens, rank, dtype, tile_size, sharpness):
    (_, _, v, *positions), dout = problem(tokens, rank, dtype, batch=batch)
    maps = (sharpness * rank**-0.5 * positions[0].double() @ positions[1].double().mT).softmax(-1)
    chosen = tiles(tile_size, tokens)

    def reference(attention, v):
        return (attention @ v).transpose(1, 2).flatten(2)

    attention = maps.to(dtype)
    out = launch.apply_map(attention, v, chosen)
    dv = launch.apply_map(attention.mT, dout.unflatten(-1, (2, rank)).transpose(1, 2), chosen)
    ours = [out, launch.map_gradient(dout, v, chosen), dv.unflatten(-1, (2, rank)).transpose(1, 2)]
    eager = differentiate(reference, (attention, v), dout, dtype)
    assert_as_good_as_eager(ours, eager, differentiate(reference, (attention, v), dout, torch.float64))
    whole = shared_attention_reference(
        *(x.double() for x in positions), v.double(), scale=sharpness * rank**-0.5
    )
    assert (out.double() - whole).norm() <= 4 * torch.finfo(dtype).eps * whole.norm()


@pytest.mark.parametrize("case", [verify.CASES[0], verify.CASES[2]], ids=lambda case: case.op)
@pytest.mark.parametrize("tokens", [32, 300])
def test_tune_finds_configurations(monkeypatch, case, tokens):
    """Every kernel's neighbours compute the same; the last of them is taken where it is the fastest."""
    tried = []

    def measure(calls, outcomes, **_):
        tried.append(list(calls))
        for i, name in enumerate(calls):
            assert outcomes[name].status == "ok", outcomes[name]
            outcomes[name].seconds = [1.0 / (1 + i)]

    monkeypatch.setattr(verify, "DEVICE", "cpu")
    monkeypatch.setattr(tune, "measure", measure)
    found = tune.search(case, (1, 1, tokens, 16), torch.float16, 0.02, float("inf"), 1.0)
    expected = {
        ("positional_attention", 32): ["forward", "backward"],
        ("positional_attention", 300): ["forward", "backward_queries", "backward_keys"],
        ("shared_attention", 32): ["apply", "map_gradient"],
        ("shared_attention", 300): ["map_gradient"],  # the map does not fit: cuBLAS, and nothing to choose
    }[case.op, tokens]
    assert list(found) == expected
    assert [str(config) for config in found.values()] == [names[-1] for names in tried]
    assert all(len(names) >= 4 for names in tried)


class Memory:
    """Watches all addresses that kernels touch: in a tensor, written once a launch, not read in that launch.

    Where that holds no order of programs or threads can change a result, and no barrier is needed.
    """

    def __init__(self, monkeypatch):
        self.extents, self.written, self.faults = [], set(), set()
        load, store, place = (
            getattr(InterpreterBuilder, name)
            for name in ("create_masked_load", "create_masked_store", "set_grid_idx")
        )

        def watched_load(builder, pointers, mask, *rest):
            if not self.written.isdisjoint(self.addresses(pointers, mask)):
                self.faults.add("read of what this launch writes")
            return load(builder, pointers, mask, *rest)

        def watched_store(builder, pointers, value, mask, *rest):
            addresses = self.addresses(pointers, mask)
            if not self.written.isdisjoint(addresses):
                self.faults.add("written twice")
            self.written.update(addresses)
            return store(builder, pointers, value, mask, *rest)

        def watched_place(builder, *index):
            if not any(index):
                self.written.clear()  # a launch begins
            return place(builder, *index)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", watched_store)
        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", watched_place)
        for owner, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
            monkeypatch.setattr(owner, name, self.known(getattr(owner, name)))

    def known(self, make):
        return lambda *args, **options: self.add(make(*args, **options))

    def add(self, tensor):
        storage = tensor.untyped_storage()
        self.extents.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        return tensor

    def addresses(self, pointers, mask):
        active = np.broadcast_to(np.asarray(mask.data).astype(bool), np.asarray(pointers.data).shape)
        found = np.unique(np.asarray(pointers.data)[active].astype(np.int64))
        inside = np.zeros(found.shape, bool)
        for start, end in self.extents:
            inside |= (start <= found) & (found < end)
        if not inside.all():
            raise IndexError("outside of all tensors")
        return found.tolist()


def touch(memory, tokens, tile_size, image_gradients=None):
    """One launch of each kernel; what was found."""
    inputs, dout = problem(tokens, 16, torch.float32, heads=2)
    for tensor in (*inputs, dout):
        memory.add(tensor)
    chosen = tiles(tile_size, tokens)
    out, lse = launch.positional_forward(*inputs, 0.25, 0.5, chosen)
    launch.positional_backward(dout, *inputs, out, lse, 0.25, 0.5, ALL, image_gradients, chosen)
    launch.apply_map(memory.add(torch.rand(2, tokens, tokens)), inputs[2], chosen)
    launch.map_gradient(dout, inputs[2], chosen)
    return memory.faults


@pytest.mark.parametrize(("tokens", "tile_size"), [(32, 32), (33, 16), (20, 32), (40, 16)])
def test_memory(tokens, tile_size, monkeypatch):
    assert not touch(Memory(monkeypatch), tokens, tile_size)


@pytest.mark.parametrize("tile_size", [16, 64])
def test_memory_sees_faults(tile_size, monkeypatch):
    """The check above can fail: one tensor for two gradients, and rows that are not there."""
    memory = Memory(monkeypatch)
    dq = memory.add(torch.empty(2, 2, 33, 16))
    assert touch(memory, 33, tile_size, (dq, dq, dq)) == {"written twice"}
    whole = launch.tiles
    monkeypatch.setattr(launch, "tiles", lambda *given: whole(*given) | {"WHOLE": True})
    with pytest.raises(Exception, match="outside of all tensors"):
        touch(memory, 33, tile_size)
