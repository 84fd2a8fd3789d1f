"""Builds the network that a file describes, with harmless arguments only and within the size of the file.

A file may come from anybody. Its description names a network of a library and some arguments. It must not make the
library read another file, ask a hub or import code. So only the arguments listed here are accepted. Their values must
be numbers, truth values, short lists of numbers, or names that are also listed here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as registration
from torch.nn.parameter import is_lazy

from tspc.errors import TspcError, WeightsError, shortened
from tspc.models import NetworkSpec

LARGEST, LARGEST_FIELD = 2**17, 2**24
"""The largest numbers taken as an argument, and as a field of transformers, which count vocabularies and contexts."""

LONGEST = 512
"""Entries of a list that is taken as an argument."""

TORCHVISION = frozenset(
    "attention_dropout aux_logits block_channels block_config block_layers bn_size depths drop_rate dropout embed_dim "
    "groups growth_rate head_dim hidden_dim image_size init_weights input_size last_channel layer_scale "
    "memory_efficient mlp_dim mlp_ratio norm_eps num_heads num_init_features num_layers partition_size patch_size "
    "reduced_tail replace_stride_with_dilation representation_size round_nearest stem_channels stochastic_depth_prob "
    "transform_input version width_mult width_per_group window_size zero_init_residual".split()
)

TIMM = frozenset(
    "act_layer aa_layer alpha attn_drop_rate attn_ratio aux_logits avg_down base_dim base_width block_config "
    "block_reduce_first bn_eps bn_momentum bn_size bottle_ratio cardinality channels class_token conv_bias conv_mlp "
    "conv_ratio depth depth_mult depth_multiplier depths dim dims distillation down_kernel_size down_patch_size "
    "downsamples drop_block_rate drop_path_rate drop_rate dynamic_img_pad dynamic_img_size embed_dim embed_dims "
    "expand_ratio expansion_ratio fc_norm feature_dim final_norm fix_init fix_stem global_pool group_size groups "
    "growth_rate head_bias head_conv_bias head_dim head_drop_rate head_hidden_size head_init_scale head_norm "
    "head_norm_first heads hidden_size hidden_sizes img_size in_chans init_values intermediate_size kernel_size "
    "kernel_sizes key_dim layer_scale_init_value layers legacy ls_init_value mlp_bias mlp_ratio mlp_ratios "
    "no_embed_class norm_eps norm_layer num_blocks num_classes num_features num_heads num_init_features num_kv_heads "
    "num_reg_tokens num_stages output_stride pad_type patch_drop_rate patch_norm patch_size patch_sizes "
    "pos_drop_rate pos_embed pre_norm proj_bias proj_drop_rate qk_norm qkv_bias reg_tokens round_limit scale_attn_norm "
    "scale_mlp scale_mlp_norm se_ratio sr_ratios stem_bias stem_chs stem_kernel_size stem_size stem_stride stem_type "
    "stem_width stage_depths strict_img_size swiglu_mlp use_abs_pos_emb use_grn use_layer_scale use_pos_embed "
    "use_post_norm use_rel_pos_bias use_shared_rel_pos_bias v2 width width_factor width_mult widths window_ratio "
    "window_size window_sizes zero_init_last".split()
)

TIMM_NAMES = frozenset(
    # pooling and its place
    "avg max avgmax catavgmax fast fastavg fastmax token map tok cls "
    # activations
    "relu relu6 leaky_relu elu celu selu prelu gelu gelu_tanh quick_gelu GELU silu swish mish hard_silu hard_swish "
    "hard_sigmoid hard_mish sigmoid tanh ReLU SiLU "
    # norms and blurs
    "batchnorm batchnorm2d batchnormact groupnorm groupnorm1 layernorm layernorm2d layernormfp32 layernorm2dfp32 "
    "rmsnorm rmsnorm2d simplenorm simplenorm2d BatchNorm2d GroupNorm LayerNorm LayerNorm2d RmsNorm blur blurpc "
    # stems, paddings, positions
    "deep deep_tiered patch overlap same learn rope none".split()
)

TRANSFORMERS_NAMES = frozenset(
    "absolute relative_key relative_key_query full_attention sliding_attention chunked_attention linear_attention "
    "default linear dynamic yarn longrope llama3 cls cls_index first last mean max same valid basic bottleneck".split()
)
"""Names that a configuration may hold besides those of activations."""

LOADING = re.compile(
    "^_|backbone|_kernels|timm|pretrained$|(?<!drop_)path|file|trust|remote|hub|implementation|detectron|architecture$"
)
"""Parts of the names of configuration fields that make transformers load something."""

_KEPT = frozenset("architectures dtype id2label label2id num_labels return_dict transformers_version".split())
"""Fields that a file may not set: they change the answer, or `NetworkSpec` sets them."""


def described_network(spec: NetworkSpec, elements: int, tensors: int) -> nn.Module:
    """The dense network of a description in a file, with arbitrary weights.

    `elements` and `tensors` are the numbers of entries and of tensors in the file. A far larger network is not built;
    it is tried without memory first. Nothing is read from disk or network, and the random state does not change.

    Raises WeightsError for arguments that are not accepted from a file, and if the network cannot be built.
    """
    _check(spec)
    return built_within(lambda: spec.build(from_file=True), spec.name, elements, tensors)


def built_within(build: Callable[[], nn.Module], name: str, elements: int, tensors: int) -> nn.Module:
    """What `build` makes, if it is not far larger than a file with so many entries and tensors. Raises WeightsError."""
    with torch.random.fork_rng(devices=[]), _bounded(elements, tensors):
        try:
            with torch.device("meta"):
                build()
        except TspcError as error:
            raise WeightsError(str(error)) from error
        except Exception:  # some networks compute with values when they are built, which none has here
            pass
        try:
            return build()
        except Exception as error:  # libraries raise anything for arguments that do not go together
            text = str(error) if isinstance(error, TspcError) else f"{type(error).__name__}: {error}"
            raise WeightsError(f"{name} cannot be built as described: {shortened(text)}") from error


def room_for(elements: int) -> int:
    """The largest number of parameters of a dense network, if its compressed form has `elements`."""
    return 1000 * elements + 10**8


@contextmanager
def _bounded(elements: int, tensors: int) -> Iterator[None]:
    """A context in which a module that grows too large, in parameters or parts, raises an error."""
    left = {"numbers": room_for(elements), "parts": 100 * tensors + 10_000}

    def count(module: nn.Module, name: str, value: Any) -> None:
        left["parts"] -= 1
        left["numbers"] -= value.numel() if isinstance(value, torch.Tensor) and not is_lazy(value) else 0
        if min(left.values()) < 0:
            raise WeightsError("the network described is far larger than the file's weights; the description is wrong")

    hooks = [
        registration.register_module_parameter_registration_hook(count),
        registration.register_module_buffer_registration_hook(count),
        registration.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check(spec: NetworkSpec) -> None:
    """Raises WeightsError for the first argument that is not accepted from a file."""
    if spec.family == "transformers":
        _check_transformers(spec)
        return
    allowed, names = {"torchvision": (TORCHVISION, ()), "timm": (TIMM, TIMM_NAMES)}.get(spec.family, ((), ()))
    if spec.family == "timm" and not re.fullmatch(r"\w+(\.\w+)?", spec.name):
        raise WeightsError(f"timm has no network {shortened(spec.name)}")
    for key, value in spec.kwargs.items():
        if key not in allowed or not _is_plain(value, names, LARGEST):
            raise _refused(key, value)


def _check_transformers(spec: NetworkSpec) -> None:
    from tspc.system import extras

    extras.require("transformers", "the network in the file")
    from transformers import CONFIG_MAPPING
    from transformers.activations import ACT2FN

    if spec.name not in CONFIG_MAPPING:
        raise WeightsError(
            f"{shortened(spec.name)} is no model type of transformers; folders and the hub are not read for a file"
        )
    try:
        usual = CONFIG_MAPPING[spec.name]()
    except Exception as error:  # a configuration that needs other packages, for example
        raise WeightsError(f"transformers cannot describe {spec.name}: {shortened(str(error))}") from error
    if any(LOADING.search(field) and not field.startswith("_") for field in vars(usual)):
        raise WeightsError(f"transformers may load other things to build {spec.name}")
    _check_fields(spec.kwargs, vars(usual), frozenset(ACT2FN) | TRANSFORMERS_NAMES)


def _check_fields(given: Mapping[str, Any], usual: Mapping[str, Any], names: frozenset[str]) -> None:
    """Accepts only fields that the type's own configuration has, with harmless values."""
    for key, value in given.items():
        if key not in usual or key in _KEPT or LOADING.search(key):
            raise _refused(key, value)
        inner = usual[key]
        if isinstance(value, dict) and hasattr(inner, "to_dict"):
            _check_fields(value, vars(inner), names)
        elif isinstance(value, dict) and isinstance(inner, dict):
            if not all(_is_plain(entry, names, LARGEST_FIELD) for entry in value.values()):
                raise _refused(key, value)
        elif not _is_plain(value, names | ({inner} if isinstance(inner, str) else set()), LARGEST_FIELD):
            raise _refused(key, value)


def _is_plain(value: Any, names: Any, largest: int, depth: int = 0) -> bool:
    """Whether a value is a number up to `largest`, a truth value, None, a name of `names`, or a short list of them."""
    if isinstance(value, list | tuple):
        return (
            depth < 2 and len(value) <= LONGEST and all(_is_plain(entry, names, largest, depth + 1) for entry in value)
        )
    if isinstance(value, str):
        return value in names
    return value is None or (isinstance(value, int | float) and abs(value) <= largest)


def _refused(key: str, value: Any) -> WeightsError:
    return WeightsError(f"its description sets {shortened(key)} to {shortened(value)}, which is not taken from a file")
