"""config.json of Hugging Face's and ours: the kinds that both sides know, and what neither may pass over in silence."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from omniloom.errors import CheckpointError, ConfigError, did_you_mean
from omniloom.model.config import ModelConfig
from omniloom.model.hf import KINDS
from omniloom.model.position import yarn_mscale

LATENT_NORM_EPS = 1e-6  # of the norms inside latent attention, whatever their config says
MUST = object()  # no default: a size


@dataclass(frozen=True)
class Fields:
    """How one kind writes a config."""

    names: dict[str, tuple[str, Any]]  # theirs: ours, and their default
    is_fixed: dict[str, Any]  # of ours: what the kind cannot have otherwise
    allowed: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # of theirs: what we can honour, where it is set
    written: dict[str, Any] = field(default_factory=dict)  # of theirs: what says so to those who read it


SIZES = {
    "vocab_size": ("vocab_size", MUST),
    "hidden_size": ("hidden_size", MUST),
    "num_hidden_layers": ("num_hidden_layers", MUST),
    "num_attention_heads": ("num_attention_heads", MUST),
    "max_position_embeddings": ("max_position_embeddings", MUST),
    "initializer_range": ("initializer_range", 0.02),
    "tie_word_embeddings": ("tie_word_embeddings", False),
}
HEADS = {"num_key_value_heads": ("num_key_value_heads", None), "head_dim": ("head_dim", None)}
PLAIN = {"norm_position": "pre", "attention_pattern": "full"}
UNSET = dict.fromkeys(("attention_log_scale_tokens", "embedding_conv_tokens"))
ROPE = {"norm": "rms", "position": "rope", "activation": "swiglu"}
GROUPED = {**PLAIN, **UNSET, **ROPE, "attention": "grouped", "partial_rotary_factor": 1.0, "yarn_mscale_all_dim": None}
SILU = {"hidden_act": ("silu", "swish")}
FIELDS = {
    "gpt2": Fields(
        names={
            "vocab_size": ("vocab_size", MUST),
            "n_embd": ("hidden_size", MUST),
            "n_layer": ("num_hidden_layers", MUST),
            "n_head": ("num_attention_heads", MUST),
            "n_positions": ("max_position_embeddings", MUST),
            "n_inner": ("intermediate_size", None),
            "layer_norm_epsilon": ("norm_eps", 1e-5),
            "initializer_range": ("initializer_range", 0.02),
            "resid_pdrop": ("dropout", 0.1),
            "tie_word_embeddings": ("tie_word_embeddings", True),
        },
        is_fixed={
            **PLAIN,
            **UNSET,
            "norm": "layer",
            "position": "learned",
            "attention": "grouped",
            "attention_bias": True,
            "mlp_bias": True,
        },
        allowed={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        written={"attn_pdrop": 0.0, "embd_pdrop": 0.0},
    ),
    "llama": Fields(
        names={
            **SIZES,
            **HEADS,
            "intermediate_size": ("intermediate_size", MUST),
            "rms_norm_eps": ("norm_eps", 1e-6),
            "attention_bias": ("attention_bias", False),
            "mlp_bias": ("mlp_bias", False),
        },
        is_fixed=GROUPED,
        allowed=SILU,
        written={"hidden_act": "silu", "attention_dropout": 0.0},
    ),
    "mixtral": Fields(
        names={
            **SIZES,
            **HEADS,
            "intermediate_size": ("moe_intermediate_size", MUST),
            "rms_norm_eps": ("norm_eps", 1e-5),
            "num_local_experts": ("n_routed_experts", 8),
            "num_experts_per_tok": ("num_experts_per_tok", 2),
        },
        is_fixed={
            **GROUPED,
            "attention_bias": False,
            "first_k_dense_replace": 0,
            "n_shared_experts": 0,
            "scoring_func": "softmax",
            "norm_topk_prob": True,
            "n_group": 1,
            "routed_scaling_factor": 1.0,
            "router_bias": False,
        },
        allowed=SILU,
        written={"hidden_act": "silu", "attention_dropout": 0.0, "sliding_window": None},
    ),
    "deepseek_v3": Fields(
        names={
            **SIZES,
            "intermediate_size": ("intermediate_size", MUST),
            "moe_intermediate_size": ("moe_intermediate_size", MUST),
            "rms_norm_eps": ("norm_eps", LATENT_NORM_EPS),
            "q_lora_rank": ("q_lora_rank", 1536),
            "kv_lora_rank": ("kv_lora_rank", MUST),
            "qk_nope_head_dim": ("qk_nope_head_dim", MUST),
            "qk_rope_head_dim": ("qk_rope_head_dim", MUST),
            "v_head_dim": ("v_head_dim", MUST),
            "first_k_dense_replace": ("first_k_dense_replace", MUST),
            "n_routed_experts": ("n_routed_experts", MUST),
            "n_shared_experts": ("n_shared_experts", MUST),
            "num_experts_per_tok": ("num_experts_per_tok", MUST),
            "norm_topk_prob": ("norm_topk_prob", True),
            "n_group": ("n_group", MUST),
            "topk_group": ("topk_group", MUST),
            "routed_scaling_factor": ("routed_scaling_factor", 2.5),
            "num_nextn_predict_layers": ("num_nextn_predict_layers", 0),
        },
        is_fixed={
            **PLAIN,
            **UNSET,
            **ROPE,
            "attention": "latent",
            "mlp_bias": False,
            "scoring_func": "sigmoid",
            "router_bias": False,
            "norm_eps": LATENT_NORM_EPS,
        },
        allowed={
            **SILU,
            "attention_bias": (False,),
            "topk_method": ("noaux_tc",),
            "scoring_func": ("sigmoid",),
            "moe_layer_freq": (1,),
        },
        written={
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "moe_layer_freq": 1,
        },
    ),
}
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
ROPE_THETA = {"llama": 10_000.0, "mixtral": 1_000_000.0, "deepseek_v3": 10_000.0}
YARN = {
    "factor": "yarn_factor",
    "original_max_position_embeddings": "yarn_original_tokens",
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
    "mscale": "yarn_mscale",
    "mscale_all_dim": "yarn_mscale_all_dim",
}


def kind_of(config: ModelConfig) -> str:
    """The model_type whose class gives the same logits of text; raises ConfigError naming the key where none does."""
    config.check()
    sparse = any(config.is_sparse(layer) for layer in range(config.num_hidden_layers))
    if config.attention == "latent":
        kind = "deepseek_v3"
    elif sparse:
        kind = "mixtral"
    else:
        kind = "gpt2" if config.position == "learned" or config.norm == "layer" else "llama"
    wanted = dict(FIELDS[kind].is_fixed)
    if not sparse:  # what says how experts are chosen is of no account
        wanted = {key: value for key, value in wanted.items() if key not in ("scoring_func", "router_bias")}
    for key, value in wanted.items():
        _refuse_unless(kind, key, config, getattr(config, key) == value, value)
    heads, width = config.num_attention_heads, config.hidden_size
    if kind == "gpt2":
        _refuse_unless(kind, "activation", config, config.activation in ACTIVATIONS.values(), "gelu_tanh, gelu or relu")
        _refuse_unless(kind, "num_key_value_heads", config, config.key_value_heads == heads, heads)
        _refuse_unless(kind, "head_dim", config, config.head_width * heads == width, f"{width} / {heads}")
    if kind == "llama":
        _refuse_unless(kind, "num_attention_heads", config, width % heads == 0, f"a divisor of {width}")
    if kind == "deepseek_v3" and sparse:
        least = "at least 2: a group's score is the sum of its two best"
        _refuse_unless(kind, "n_routed_experts", config, config.n_routed_experts >= 2, least)
    for key in ("yarn_mscale", "yarn_mscale_all_dim"):
        _refuse_unless(kind, key, config, getattr(config, key) != 0, "null: 0 counts as unset there")
    return kind


def _refuse_unless(kind: str, key: str, config: ModelConfig, is_so: bool, wanted: Any) -> None:
    if not is_so:
        shown = wanted if isinstance(wanted, str) else json.dumps(wanted)
        raise ConfigError(
            f"no Hugging Face class gives this model's logits: {KINDS[kind].architecture}, the nearest, needs "
            f"model.{key}={shown}; it is {getattr(config, key)}"
        )


def to_hugging_face(config: ModelConfig) -> dict[str, Any]:
    """Their config.json of our config; raises ConfigError where no class of theirs can hold it."""
    kind = kind_of(config)
    fields = FIELDS[kind]
    theirs: dict[str, Any] = {"model_type": kind, "architectures": [KINDS[kind].architecture], **fields.written}
    theirs |= {name: getattr(config, ours) for name, (ours, _) in fields.names.items()}
    if kind == "gpt2":
        theirs |= {"n_ctx": config.max_position_embeddings}
        theirs["activation_function"] = next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)
        return theirs
    if config.attention == "grouped":
        theirs |= {"head_dim": config.head_width, "num_key_value_heads": config.key_value_heads}
    else:
        theirs |= {"num_key_value_heads": config.num_attention_heads, "rope_interleave": True}
        if not config.n_routed_experts:
            theirs |= {"first_k_dense_replace": config.num_hidden_layers, "num_nextn_predict_layers": 0}
    # As version 4 wrote it, which version 5 reads too, as servers do.
    theirs["rope_theta"], theirs["rope_scaling"] = config.rope_theta, None
    if config.yarn_factor is not None:
        values = {name: getattr(config, ours) for name, ours in YARN.items()}
        scaling = {name: value for name, value in values.items() if value is not None}
        theirs["rope_scaling"] = {"type": "yarn", "rope_type": "yarn", **scaling}
    return theirs


def from_hugging_face(theirs: Mapping[str, Any], where: str) -> tuple[str, ModelConfig]:
    """The model_type and our config of their config.json at `where`.

    Raises CheckpointError naming the field that is missing, that we do not know, or cannot honour.
    """
    kind = theirs.get("model_type")
    if kind not in FIELDS:
        raise CheckpointError(f"{where}: model_type={kind} is none that is read; {did_you_mean(str(kind), FIELDS)}")
    try:
        ours = _ours(str(kind), theirs)
        config = TypeAdapter(ModelConfig).validate_python(ours)
        config.check()
    except (ConfigError, CheckpointError) as error:
        raise CheckpointError(f"{where}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{where}: what would be model.{first['loc'][0]}: {first['msg']}") from error
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{where} is malformed: {error}") from error
    return str(kind), config


def _ours(kind: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
    fields = FIELDS[kind]
    if theirs.get("quantization_config") is not None:
        method = theirs["quantization_config"].get("quant_method")
        raise CheckpointError(f"quantization_config ({method}): quantised weights are not read; convert them to bf16")
    for name, allowed in fields.allowed.items():
        if theirs.get(name) is not None and theirs[name] not in allowed:
            _refuse(name, theirs[name], f"it must be {json.dumps(allowed[0])}")
    ours: dict[str, Any] = dict(fields.is_fixed)
    ours |= {"image_patch_pixels": None, "video_patch_pixels": None, "audio_mels": None, "initializer": "normal"}
    for name, (key, default) in fields.names.items():
        ours[key] = theirs.get(name, default)
        if ours[key] is MUST:
            raise CheckpointError(f"{name} is missing")
    return ours | {"gpt2": _gpt2, "llama": _llama, "mixtral": _mixtral, "deepseek_v3": _deepseek}[kind](theirs)


def _refuse(name: str, value: Any, rule: str) -> NoReturn:
    raise CheckpointError(f"{name}={value} cannot be honoured: {rule}")


def _gpt2(theirs: Mapping[str, Any]) -> dict[str, Any]:
    activation = theirs.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        _refuse("activation_function", activation, did_you_mean(str(activation), ACTIVATIONS))
    inner = theirs.get("n_inner") or 4 * theirs["n_embd"]
    plain = {"initializer": "residual", "n_routed_experts": 0}
    return {"activation": ACTIVATIONS[activation], "intermediate_size": inner, **plain}


def _llama(theirs: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_interleave": False, "n_routed_experts": 0, **_rope(theirs, "llama")}


def _mixtral(theirs: Mapping[str, Any]) -> dict[str, Any]:
    window, context = theirs.get("sliding_window"), theirs["max_position_embeddings"]
    if window is not None and window < context:
        _refuse("sliding_window", window, f"attention sees the whole context, max_position_embeddings={context}")
    return {"rope_interleave": False, **_rope(theirs, "mixtral")}


def _deepseek(theirs: Mapping[str, Any]) -> dict[str, Any]:
    eps, heads = theirs.get("rms_norm_eps", LATENT_NORM_EPS), theirs["num_attention_heads"]
    if eps != LATENT_NORM_EPS:
        _refuse(
            "rms_norm_eps", eps, f"the norms inside their latent attention have {LATENT_NORM_EPS}, ours have it all"
        )
    if theirs.get("num_key_value_heads") not in (None, heads):
        rule = f"latent attention has as many as num_attention_heads={heads}"
        _refuse("num_key_value_heads", theirs["num_key_value_heads"], rule)
    ours = {name: theirs[name] or 1 for name in ("n_group", "topk_group")}
    ours["num_nextn_predict_layers"] = theirs.get("num_nextn_predict_layers", theirs.get("num_mtp_layers")) or 0
    return {"rope_interleave": theirs.get("rope_interleave") is not False, **ours, **_rope(theirs, "deepseek_v3")}


def _rope(theirs: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """θ and YaRN, from version 5's rope_parameters or version 4's rope_theta and rope_scaling."""
    rope: dict[str, Any] = dict(theirs.get("rope_parameters") or theirs.get("rope_scaling") or {})
    told = (rope.pop("rope_theta", None), theirs.get("rope_theta"), ROPE_THETA[kind])
    theta = next(value for value in told if value is not None)
    old, new = rope.pop("type", None), rope.pop("rope_type", None)
    for share in (theirs.get("partial_rotary_factor"), rope.pop("partial_rotary_factor", None)):
        if share not in (None, 1.0):
            _refuse("partial_rotary_factor", share, "it must be 1.0")
    name = new or old or "default"
    if name == "default":
        return {"rope_theta": theta}
    if name != "yarn":
        _refuse("rope_type", name, "it must be default or yarn")
    values = {ours: rope.pop(name, None) for name, ours in YARN.items()}
    context = theirs["max_position_embeddings"]
    original = values["yarn_original_tokens"] = values["yarn_original_tokens"] or context
    factor = values["yarn_factor"] = values["yarn_factor"] or context / original
    length = yarn_mscale(factor)
    if values["yarn_mscale"] and values["yarn_mscale_all_dim"]:
        length = yarn_mscale(factor, values["yarn_mscale"]) / yarn_mscale(factor, values["yarn_mscale_all_dim"])
    told = rope.pop("attention_factor", None)
    if told is not None and not math.isclose(told, length, rel_tol=1e-6):
        _refuse("attention_factor", told, f"YaRN's is {length} here")
    if rope.pop("truncate", True) is not True:
        _refuse("truncate", False, "YaRN's ramp has whole ends")
    if rope:
        raise CheckpointError(f"RoPE's {', '.join(rope)} cannot be honoured")
    return {"rope_theta": theta} | {key: value for key, value in values.items() if value}
