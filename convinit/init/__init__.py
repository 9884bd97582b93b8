"""Initialisers in the style of ``torch.nn.init``: in place, under ``no_grad``, returning what they wrote.

Every draw is made on the CPU in float32 and then copied to the tensor, so that one seed gives one result
on every device and for every dtype. ``generator`` is therefore a CPU generator; None means torch's own.

=====================  ======================================================================
query/key weights      ``impulse_qk_``  ``mimetic_qk_``  ``random_qk_``
controls for them      ``scrambled_qk_``  ``norm_matched_qk_``
query/key biases       ``rotary_impulse_qk_``, for rotary position embedding
value/output weights   ``mimetic_vo_``
depthwise filters      ``random_filter_``  ``impulse_filter_``  ``box_filter_``  ``gaussian_filter_``
                       ``softmax_filter_``
relative position bias ``impulse_bias_table_``, for window attention
token-mixing MLP       ``impulse_token_mixing_``, for MLP-Mixer
mixing matrices        ``impulse_mixing_``  ``permutation_mixing_``  ``full_permutation_mixing_``
linear, convolution    ``default_``
=====================  ======================================================================

A query/key pair is ``wq, wk [heads, D, r]`` with q = x @ wq[h]. The weight of an ``nn.Linear`` is such a
tensor as a view: ``linear.weight.view(heads, r, D).mT``.
"""

from convinit.init.bias_table import impulse_bias_table_
from convinit.init.filters import (
    box_filter_,
    gaussian_filter_,
    impulse_filter_,
    random_filter_,
    softmax_filter_,
)
from convinit.init.linear import default_
from convinit.init.mixing import full_permutation_mixing_, impulse_mixing_, permutation_mixing_
from convinit.init.query_key import impulse_qk_, mimetic_qk_, norm_matched_qk_, random_qk_, scrambled_qk_
from convinit.init.rotary import rotary_angles, rotary_impulse_qk_
from convinit.init.token_mixing import impulse_token_mixing_
from convinit.init.value_output import mimetic_vo_

__all__ = [
    "box_filter_",
    "default_",
    "full_permutation_mixing_",
    "gaussian_filter_",
    "impulse_bias_table_",
    "impulse_filter_",
    "impulse_mixing_",
    "impulse_qk_",
    "impulse_token_mixing_",
    "mimetic_qk_",
    "mimetic_vo_",
    "norm_matched_qk_",
    "permutation_mixing_",
    "random_filter_",
    "random_qk_",
    "rotary_angles",
    "rotary_impulse_qk_",
    "scrambled_qk_",
    "softmax_filter_",
]
