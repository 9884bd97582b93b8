"""Bad input to every public function: the right kind of error, with the argument's name in its message.

Each function has a call that works and, for each of its arguments, a kind; each kind has bad values.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import convinit
from convinit import fit, init, nn
from convinit.models import ConvMixer, SimpleViT
from convinit.ops.positional_attention import packed_attention

INF, NAN = float("inf"), float("nan")
T, V = TypeError, ValueError
GRID = (3, 3)
P = nn.sincos_2d(GRID, 8)
OFFSETS = torch.tensor([[0, 1], [1, 0]])


def wrong_tensors(good: torch.Tensor) -> list[tuple[Any, type[Exception]]]:
    """What is no dense floating-point tensor, and wrong shapes; `good` is the right one."""
    return [
        (good.numpy(), T), (good.tolist(), T), ("q", T), (3, T), (None, T),
        (good.int(), T), (good.bool(), T), (good.to(torch.complex64), T), (good.to(torch.float8_e4m3fn), T),
        (good.to_sparse(), T), (torch.nested.nested_tensor([good, good]), T),
        (good[None, None], V), (good[..., 0], V),
    ]  # fmt: skip


KINDS: dict[str, list[tuple[Any, type[Exception]]]] = {
    "int": [(2.5, T), (2.0, T), ("2", T), (True, T), (None, T), (torch.tensor(2), T), (np.float32(2), T),
            (np.array([2]), T), (0, V), (-3, V), (np.int64(-3), V)],
    "number": [("0.5", T), (True, T), (torch.tensor(0.5), T), (np.array([0.5, 1]), T), (0.5j, T), (NAN, V),
        (INF, V)],
    "share": [("0.5", T), (torch.tensor(0.5), T), (NAN, V), (-0.1, V), (1.5, V)],
    "choice": [("nothing", V), (3, V), (np.array(["a", "b"]), V), (b"zeros", V)],
    "flag": [("yes", T), (1, T), (np.array([True, False]), T)],
    "generator": [(0, T), ("0", T), (np.random.default_rng(0), T)],
    "grid": [(3, T), ("33", T), (None, T), (np.array([3, 3]), T), ((3,), V), ((3, 3, 3), V), ((3.0, 3), T),
             ((True, 3), T), (("3", 3), T), ((0, 3), V), ((3, -3), V), ((2**20, 2**20), V)],
    "offsets": [([[0, 1], [1, 0]], T), (OFFSETS.numpy(), T), ("random", T), (OFFSETS.float(), T),
        (OFFSETS.bool(), T),
                (OFFSETS.to(torch.uint64), T), (OFFSETS.to(torch.complex64), T), (OFFSETS.to_sparse(), T),
                (OFFSETS[0], V), (torch.zeros(2, 3, dtype=torch.int64), V)],
    "kernel": [(2, V), (0, V), (-3, V), (3.0, T), ("3", T), (True, T), (2**40 + 1, V)],
    "window": [(2, V), (7, V), (3.0, T), ("3", T), (None, T)],
    "meta offsets": [(OFFSETS.to("meta"), V)],
    "far offsets": [(torch.tensor([[0, 9], [0, 0]]), V), (torch.tensor([[3, 0], [0, 0]]), V)],
}  # fmt: skip
KINDS["positive"] = [*KINDS["number"], (0, V), (-1, V)]
KINDS["rate"] = [*KINDS["share"], (1, V)]
KINDS["size"] = [(2.5, T), ("4", T), (None, T), ((4,), V), ((4, 4, 4), V), (0, V), ((4, 0.5), T)]


def f(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0.25)


def values(good: torch.Tensor) -> list[tuple[Any, type[Exception]]]:
    """Tensors whose values are looked at."""
    return [*wrong_tensors(good), (good.to("meta"), V), (good * NAN, V)]


Q, W = f(1, 2, 4, 3), f(2, 8, 4)
ATTENTION = {"q": Q, "k": Q, "v": Q, "q_pos": Q[0], "k_pos": Q[0], "scale": 0.5, "alpha": 0.5,
    "dropout_p": 0.0,
             "backend": "auto"}  # fmt: skip
NUMBERS = {"scale": "number", "alpha": "number", "dropout_p": "rate", "backend": "choice"}
OPTIONAL = [case for case in wrong_tensors(Q[0]) if case[0] is not None]
META = [(Q.to("meta"), V)]
LAYER_OFFSETS = [("drawn", V)] + [case for case in KINDS["offsets"] if not isinstance(case[0], str)]
FIT = {
    "pos_embed": P,
    "offsets": OFFSETS,
    "grid_size": GRID,
    "rank": 4,
    "scale": 0.5,
    "fit": "newton",
    "peak": 0.5,
}
FIT_KINDS = {
    "rank": "int",
    "scale": "positive",
    "fit": "choice",
    "peak": "positive",
    "generator": "generator",
}
ANGLES = torch.stack([torch.arange(9) // 3 * 0.9, torch.arange(9) % 3 * 0.9], dim=1)
LAYER = {"dim": 8, "num_heads": 2, "grid_size": GRID, "kernel_size": 3}
VIT = {"image_size": 6, "patch_size": 2, "num_classes": 3, "dim": 8, "depth": 1, "num_heads": 2,
    "head_dim": 4,
       "mlp_dim": 8, "kernel_size": 3}  # fmt: skip
MIXER = {"image_size": 6, "patch_size": 2, "num_classes": 3, "dim": 4, "depth": 1, "kernel_size": 3}
SIZES = {name: "int" for name in ("num_classes", "dim", "channels")}


def written(function: Callable, *shapes: tuple[int, ...], names: str) -> tuple[Callable, dict, dict]:
    """An initialiser of weights of these shapes and nothing else but a generator."""
    tensors = dict(zip(names.split(), (f(*shape) for shape in shapes), strict=True))
    kinds = {name: wrong_tensors(tensor) for name, tensor in tensors.items()}
    return function, tensors, kinds | {"generator": "generator"}


# Each: the function, arguments with which it works, the kind (or the bad values) of each argument.
TABLE: dict[str, tuple[Callable, dict[str, Any], dict[str, Any]]] = {
    "sample_offsets": (convinit.sample_offsets, {"num_heads": 2, "kernel_size": 3},
        {"num_heads": "int", "kernel_size": "kernel", "stratified": "flag", "generator": "generator"}),
    "impulse_targets": (convinit.impulse_targets, {"offsets": OFFSETS, "grid_size": GRID},
        {"offsets": "offsets", "grid_size": "grid", "padding_mode": "choice"}),
    "impulse_matrix": (convinit.impulse_matrix, {"offsets": OFFSETS, "grid_size": GRID},
        {"offsets": "offsets", "grid_size": "grid", "padding_mode": "choice",
         "dtype": [(torch.int64, T), ("float32", T), (3, T)], "device": [(3.5, T), ("tpu9", V)]}),
    "impulse_conv": (convinit.impulse_conv, {"x": f(1, 2, 3, 3), "offsets": OFFSETS, "gain": f(2),
        "bias": f(2)},
        {"x": wrong_tensors(f(1, 2, 3, 3)), "offsets": KINDS["offsets"] + KINDS["meta offsets"],
         "gain": [(0.5, T), (np.ones(2), T), (f(3), V), (f(2).int(), T), (f(2).to("meta"), V)],
         "bias": [("0", T), (f(2, 1), V), (f(2).to(torch.complex64), T), (f(2).to("meta"), V)]}),
    "positional_attention": (convinit.positional_attention, ATTENTION,
        {"q": wrong_tensors(Q) + [(f(1, 2, 4, 0), V)], "k": wrong_tensors(Q) + META + [(Q.double(), T)],
         "v": wrong_tensors(Q) + META, "q_pos": OPTIONAL + [(Q[0].to("meta"), V)],
         "k_pos": OPTIONAL + [(Q[0].to("meta"), V)], **NUMBERS}),
    "packed_attention": (packed_attention, {"qkv": f(1, 4, 18), "num_heads": 2},
        {"qkv": wrong_tensors(f(1, 4, 18)), "num_heads": KINDS["int"] + [(5, V)], **NUMBERS}),
    "shared_attention": (convinit.shared_attention, {"q_map": Q[0], "k_map": Q[0], "v": Q, "scale": 0.5},
        {"q_map": wrong_tensors(Q[0]) + [(Q[0].to("meta"), V)],
         "k_map": wrong_tensors(Q[0]) + [(Q[0].double(), T)],
         "v": wrong_tensors(Q), "scale": "number", "dropout_p": "rate", "backend": "choice"}),
    "fit_qk": (convinit.fit_qk, FIT,
        {"pos_embed": values(P) + [(f(9, 8), V)], "grid_size": "grid", "padding_mode": "choice",
         "offsets": KINDS["offsets"] + KINDS["meta offsets"] + KINDS["far offsets"],
         **FIT_KINDS, "fit": [("sgd", V), (3, T), (None, T)]}),
    "fit_qk at a norm": (convinit.fit_qk, {**FIT, "peak": None, "weight_norm": 3.0},
        {"weight_norm": [("3", T), (True, T), (NAN, V), (0, V), (np.ones(2), T), (f(3), V), (f(2) - 1, V),
                         (f(2).to("meta"), V), (f(2).to(torch.complex64), T), (torch.tensor([3, 3]), T)]}),
    "fit_targets": (convinit.fit_targets, {"pos_embed": P, "targets": torch.arange(9)[None], "rank": 4,
        "scale": 0.5},
        {"pos_embed": values(P), "rank": "int", "scale": "positive", "peak": "positive",
         "generator": "generator",
         "targets": [(np.zeros((1, 9), int), T), ([[0] * 9], T), (torch.zeros(1, 9), T), (torch.arange(9), V),
                     (torch.full((1, 9), 9), V), (torch.full((1, 9), -2), V), (torch.full((1, 9), -1), V),
                     (torch.arange(9, device="meta")[None], V), (torch.arange(9)[None].to_sparse(), T)]}),
    "Newton": (fit.Newton, {}, {"max_iterations": [(1.5, T), ("9", T), (-1, V), (2**63, V)],
                                "tolerance": [("0", T), (NAN, V), (-1, V), (torch.tensor(0.1), T)]}),
    "Adam": (fit.Adam, {}, {"lr": "positive", "steps": "int", "norm_interval": "int"}),
    "SVD": (fit.SVD, {}, {"impulse_logit": "positive", "noise": KINDS["number"] + [(-1, V)],
        "noise_std": "positive",
                          "weight_norm": "positive"}),
    "random_filter_": written(init.random_filter_, (2, 1, 3, 3), names="weight"),
    "impulse_filter_": written(init.impulse_filter_, (2, 1, 3, 3), names="weight"),
    "softmax_filter_": written(init.softmax_filter_, (2, 1, 3, 3), names="weight"),
    "box_filter_": (init.box_filter_, {"weight": f(2, 1, 3, 3), "num_cells": 2},
        {"weight": [(f(2, 2, 3, 3), V), (f(2, 1, 3, 4), V)], "num_cells": KINDS["int"] + [(10, V)]}),
    "gaussian_filter_": (init.gaussian_filter_, {"weight": f(2, 1, 3, 3)}, {"variance": "positive"}),
    "default_": (init.default_, {"weight": f(4, 3), "bias": f(4)},
        {"weight": wrong_tensors(f(4, 3))[:11], "bias": [("0", T), (np.ones(4), T), (f(4).int(), T), (f(4,
         1), V)],
         "generator": "generator"}),
    "random_qk_": written(init.random_qk_, (2, 8, 4), (2, 8, 4), names="wq wk"),
    "mimetic_qk_": (init.mimetic_qk_, {"wq": W, "wk": W.clone()},
        {"wq": [(f(2, 4, 8), V)], "noise": "number", "identity": "number", "distribution": "choice"}),
    "norm_matched_qk_": (init.norm_matched_qk_, {"wq": W, "wk": W.clone(), "weight_norm": 2.0},
        {"weight_norm": [("2", T), (None, T), (NAN, V), (-1, V), (f(3), V), (np.ones(2), T),
         (f(2).to("meta"), V)],
         "generator": "generator"}),
    "impulse_qk_": (init.impulse_qk_, {"wq": W.clone(), "wk": W.clone(), **FIT} | {"rank": None},
        {"wq": wrong_tensors(W), "wk": wrong_tensors(W), "pos_embed": values(P), "offsets": "offsets",
         "grid_size": "grid", "scale": "positive", "peak": "positive", "padding_mode": "choice"}),
    "scrambled_qk_": (init.scrambled_qk_, {"wq": W.clone(), "wk": W.clone(), "pos_embed": P, "scale": 0.5},
        {"wq": wrong_tensors(W), "pos_embed": values(P), "scale": "positive", "generator": "generator"}),
    "mimetic_vo_": (init.mimetic_vo_, {"wv": f(8, 8), "wo": f(8, 8)},
        {"wv": wrong_tensors(f(8, 8)), "wo": wrong_tensors(f(8, 8)), "noise": "number",
         "distribution": "choice"}),
    "rotary_impulse_qk_": (init.rotary_impulse_qk_,
        {"bq": f(2, 4), "bk": f(2, 4), "angles": ANGLES, "offsets": OFFSETS, "grid_size": GRID, "scale": 0.5,
         "peak": 0.5},
        {"bq": wrong_tensors(f(2, 4)), "bk": wrong_tensors(f(2, 4)), "angles": values(ANGLES),
         "offsets": "offsets",
         "grid_size": "grid", "scale": "positive", "peak": "positive", "pairs": "choice",
          "generator": "generator"}),
    "rotary_angles": (init.rotary_angles, {"sin": f(9, 4), "cos": f(9, 4)},
        {"sin": wrong_tensors(f(9, 4)), "cos": wrong_tensors(f(9, 4)), "pairs": "choice"}),
    "impulse_bias_table_": (init.impulse_bias_table_, {"table": f(25, 2), "offsets": OFFSETS,
        "window_size": GRID},
        {"table": wrong_tensors(f(25, 2)), "offsets": "offsets", "window_size": "grid", "peak": "positive",
         "value": "positive", "padding_mode": "choice"}),
    "impulse_token_mixing_": (init.impulse_token_mixing_,
        {"fc1_weight": f(18, 9), "fc1_bias": f(18), "fc2_weight": f(9, 18), "fc2_bias": f(9),
         "offsets": OFFSETS,
         "grid_size": GRID},
        {"fc1_weight": wrong_tensors(f(18, 9)), "fc2_weight": wrong_tensors(f(9, 18)), "offsets": "offsets",
         "fc1_bias": [(np.ones(18), T), (f(9), V)], "fc2_bias": [("0", T), (f(18), V)], "grid_size": "grid",
         "gain": "positive", "padding_mode": "choice"}),
    "impulse_mixing_": (init.impulse_mixing_, {"weight": f(2, 9, 9), "grid_size": GRID, "kernel_size": 3},
        {"weight": wrong_tensors(f(2, 9, 9)), "grid_size": "grid", "kernel_size": "window", "gain": "number",
         "padding_mode": "choice", "generator": "generator"}),
    "permutation_mixing_": written(init.permutation_mixing_, (2, 9, 9), names="weight"),
    "full_permutation_mixing_": (init.full_permutation_mixing_, {"weight": f(2, 9, 9)}, {"gain": "number"}),
    "sincos_2d": (nn.sincos_2d, {"grid_size": GRID, "dim": 8},
        {"grid_size": "grid", "dim": KINDS["int"] + [(6, V)], "temperature": "positive",
         "dtype": [(torch.int32, T), ("float32", T), (torch.complex64, T)]}),
    "ConvInitAttention": (nn.ConvInitAttention, LAYER,
        {"dim": "int", "num_heads": "int", "grid_size": "grid", "kernel_size": KINDS["window"][:4],
         "alpha": "share",
         "scale": "positive", "attn_drop": "rate", "proj_drop": "rate", "variant": "choice",
         "method": "choice",
         "values": "choice", "backend": "choice", "padding_mode": "choice", "qkv_bias": "flag",
          "value": "flag",
         "proj": "flag", "trainable_mixing": "flag", "offsets": LAYER_OFFSETS + KINDS["meta offsets"],
         "pos_embed": [(P.numpy(), T), (P.int(), T), (P[0], V), (P * NAN, V)], "generator": "generator"}),
    "ConvInitAttention()": (nn.ConvInitAttention(**LAYER).forward, {"x": f(2, 9, 8)},
        {"x": wrong_tensors(f(2, 9, 8)) + [(f(2, 4, 8), V), (f(2, 9, 8).to("meta"), V)]}),
    "set_qk_": (nn.ConvInitAttention(**LAYER).set_qk_, {"wq": W, "wk": W, "offsets": OFFSETS},
        {"wq": wrong_tensors(W), "wk": wrong_tensors(W), "offsets": "offsets"}),
    "SpatialConv": (nn.SpatialConv, {"dim": 4, "kernel_size": 3},
        {"dim": "int", "kernel_size": "int", "method": "choice", "num_cells": "int", "variance": "positive",
         "trainable": "flag", "bias": "flag", "num_filters": [(9, V), (0, V), ("2", T)],
          "generator": "generator"}),
    "SpatialConv on a grid": (nn.SpatialConv, {"dim": 4, "kernel_size": 3, "method": "impulse",
        "grid_size": GRID},
        {"kernel_size": "window", "grid_size": KINDS["grid"][:2]}),
    "SpatialConv()": (nn.SpatialConv(2, 3).forward, {"x": f(1, 2, 4, 4)},
        {"x": wrong_tensors(f(1, 2, 4, 4))[:11] + [(f(1, 2, 4, 4).to("meta"), V)]}),
    "SimpleViT": (SimpleViT, VIT,
        {**SIZES, "image_size": "size", "patch_size": "size", "depth": [(-1, V), (1.5, T)],
         "num_heads": "int",
         "head_dim": [(0, V), (2.5, T)], "mlp_dim": "int", "variant": "choice",
         "method": "choice",
          "alpha": "share",
         "kernel_size": KINDS["window"][:4], "scale": "positive", "offsets": LAYER_OFFSETS,
         "peak": "positive",
         "attn_drop": "rate", "generator": "generator"}),
    "SimpleViT()": (SimpleViT(**VIT).forward, {"images": f(1, 3, 6, 6)},
        {"images": wrong_tensors(f(1, 3, 6, 6)) + [(f(1, 1, 6, 6), V), (f(1, 3, 8, 8), V)]}),
    "ConvMixer": (ConvMixer, MIXER,
        {**SIZES, "image_size": "size", "patch_size": "size", "depth": [(-1, V), ("1", T)],
         "kernel_size": "int",
         "method": "choice", "variance": "positive", "matrix_form": "flag", "share_layers": "flag",
         "trainable_mixing": "flag", "generator": "generator"}),
    "ConvMixer()": (ConvMixer(**MIXER).eval().forward, {"images": f(1, 3, 6, 6)},
        {"images": wrong_tensors(f(1, 3, 6, 6)) + [(f(1, 1, 6, 6), V), (f(1, 3, 8, 8), V)]}),
}  # fmt: skip
del TABLE["impulse_qk_"][1]["rank"]


def cases():
    for function, (_, _, kinds) in TABLE.items():
        for name, kind in kinds.items():
            for i, (value, error) in enumerate(KINDS[kind] if isinstance(kind, str) else kind):
                yield pytest.param(function, name, value, error, id=f"{function}-{name}-{i}")


@pytest.mark.parametrize("function", TABLE)
def test_the_good_call_works(function):
    call, arguments, _ = TABLE[function]
    call(**arguments)


@pytest.mark.parametrize("function, name, value, error", list(cases()))
def test_an_error_names_the_argument(function, name, value, error):
    call, arguments, _ = TABLE[function]
    with pytest.raises((TypeError, ValueError)) as raised:
        call(**{**arguments, name: value})
    assert type(raised.value) is error, repr(raised.value)
    assert re.search(rf"\b{name}\b", str(raised.value)), str(raised.value)


def test_there_are_enough():
    assert sum(1 for _ in cases()) >= 250


@pytest.mark.parametrize("number", [np.int64(2), np.int32(2), np.uint8(2)])
def test_numpy_s_numbers_are_numbers(number):
    attention = nn.ConvInitAttention(
        8, number, (np.int64(3), 3), head_dim=number, kernel_size=3, alpha=np.float32(0.2)
    )
    assert attention(f(1, 9, 8)).shape == (1, 9, 8)
    SimpleViT(**{**VIT, "num_heads": number, "mlp_dim": number, "depth": number})(f(1, 3, 6, 6))
    ConvMixer(**{**MIXER, "dim": number})
    assert convinit.positional_attention(Q, Q, Q, scale=np.float32(0.5), alpha=number).shape == (1, 4, 6)


COMMANDS = {
    "--scale nan": "scale", "--scale 0": "scale", "--scale 1e-300": "scale",
        "--weight-norm 1e300": "--weight-norm",
    "--weight-norm 1e30": "--weight-norm", "--weight-norm -1": "--weight-norm", "--peak 1": "peak",
        "--peak nan": "peak",
    "-f 4": "--kernel-size", "-f 99": "--kernel-size", "-f 9": "--kernel-size", "--rank 17": "rank",
        "--rank 0": "rank",
    "--heads 0": "heads", "--layers -1": "layers", "--dim 15": "dim", "--grid 4x": "grid",
    "--seed 99999999999999999999": "seed", "--fit svd --weight-norm 1e300": "--weight-norm",
        "--steps 3": "steps",
}  # fmt: skip


@pytest.mark.parametrize("options", COMMANDS)
def test_a_command_fails_and_names_the_option(options, capsys, monkeypatch):
    from convinit.cli import main

    base = "convinit fit --grid 4 --dim 16 --heads 2 --layers 1 -f 3"
    monkeypatch.setattr(sys, "argv", [*base.split(), *options.split()])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    assert left.value.code not in (0, None)
    assert COMMANDS[options] in err and "Traceback" not in err and "nan" not in out
