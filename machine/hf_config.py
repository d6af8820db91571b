"""config.json: what it says of a Llama, in the spelling of transformers 4 or 5, or why not.

    check_config(dict) -> dict          every default filled in; else refused, in one line
    windows(dict) -> list               the windows that a scaled checkpoint's config may mean
    new_scaling(config, scaling, name)  another rotary embedding; two on top of each other: refused
    exported(dict, window) -> dict      what of a config.json an export takes over

What transformers 5 computes from a config.json is what is computed here. Where it contradicts
itself, so that readers differ, it is refused; an entry that nobody here reads is named.
"""

from functools import lru_cache

from model import CONFIG_NAMES
from rope_kernels import rope_frequencies

# model_type -> the architecture that config.json names
FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# transformers' own defaults for what a config.json leaves out
WINDOWS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
# Entries that say how long a text may be: vLLM takes the smallest it finds, so all are kept alike.
WINDOW_NAMES = (
    "max_position_embeddings max_sequence_length max_seq_length max_seq_len seq_length seq_len "
    "n_positions n_ctx model_max_length tokenizer_model_max_length"
).split()
# Entries that need no warning: no family's forward pass reads them, or _refuse_unsupported does.
NO_EFFECT = set(
    "model_type architectures _name_or_path torch_dtype dtype transformers_version use_cache "
    "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id initializer_range "
    "attention_dropout pretraining_tp max_length max_window_layers use_sliding_window "
    "sliding_window layer_types hidden_act partial_rotary_factor quantization_config "
    "rope_parameters original_max_position_embeddings attention_bias mlp_bias auto_map "
    "chunk_size_feed_forward output_attentions output_hidden_states return_dict "
    "task_specific_params problem_type id2label label2id tokenizer_class is_decoder "
    "is_encoder_decoder torchscript unsloth_version unsloth_fixed attn_implementation "
    "_attn_implementation name finetuning_task hidden_dropout hidden_dropout_prob resid_pdrop "
    "embd_pdrop attn_dropout rope_interleaved use_return_dict transformers.js_config "
    "is_llama_config mask_token_id cls_token_id decoder_start_token_id".split()
) | {*CONFIG_NAMES.values(), *WINDOW_NAMES}


@lru_cache(1000)
def say_once(line: str) -> None:
    """Print a line about the run, once in a process."""
    print(line, flush=True)


def check_config(hf: dict) -> dict:
    """Return a config.json, in transformers 4's or 5's spelling, with every default filled in.

    Rotary is under rope_theta and rope_scaling (None: unscaled, else every key by its newest name).
    Raises ValueError naming the entry that is missing, absurd or that describes something no Llama
    computes (sliding windows, partial rotary, ...), or two that contradict each other.
    """
    family = str(hf.get("model_type", "llama"))
    if family not in FAMILIES:
        raise ValueError(
            f"model_type is {family:.60}, which is not computed here; need one of "
            f"{', '.join(FAMILIES)}"
        )
    n_layers = _number(hf, "num_hidden_layers", most=1000)
    _refuse_unsupported(hf, family, n_layers)
    d_model = _number(hf, "hidden_size")
    n_heads = _number(hf, "num_attention_heads")
    absent = {} if "num_key_value_heads" in hf else KV_HEADS  # null means n_heads, in all of them
    n_kv_heads = _number(hf, "num_key_value_heads", absent.get(family, n_heads))
    if n_heads % n_kv_heads:
        raise ValueError(
            f"num_attention_heads {n_heads} is not a multiple of num_key_value_heads "
            f"{n_kv_heads}; config.json is damaged or not a Llama's"
        )
    # Qwen3's own default; the others' is what the width leaves each head.
    head_dim = _number(hf, "head_dim", 128 if family == "qwen3" else d_model // n_heads)
    window = _number(hf, "max_position_embeddings", WINDOWS[family], most=2**40)
    theta, scaling = _rope_from_hf(hf, window)
    rope_frequencies(head_dim, theta, scaling)  # a bad theta or scaling ends here, explained
    _name_the_unknown(hf, family)
    return hf | {
        "rope_parameters": None,
        "model_type": family,
        "num_key_value_heads": n_kv_heads,
        "head_dim": head_dim,
        "intermediate_size": _number(hf, "intermediate_size"),
        "vocab_size": _number(hf, "vocab_size"),
        "rms_norm_eps": _number(hf, "rms_norm_eps", 1e-6, most=1, kind=float),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "max_position_embeddings": max(windows(hf)),
        "tie_word_embeddings": _flag(hf, "tie_word_embeddings"),
        "attention_bias": family in ("llama", "qwen3") and _flag(hf, "attention_bias"),
        "mlp_bias": family == "llama" and _flag(hf, "mlp_bias"),
    }


def _number(hf: dict, key: str, default=None, most: int = 2**20, kind: type = int):
    """Return a number of a config.json. 2^20 is far above any Llama, and no product overflows."""
    value = default if hf.get(key) is None else hf[key]
    if type(value) is not kind or not 0 < value <= most:
        need = f"a number ({kind.__name__}) above 0, at most {most}"
        raise ValueError(f"{key} is {value!r:.60}, need {need}")
    return value


def _flag(hf: dict, key: str) -> bool:
    value = hf.get(key) or False
    if value not in (True, False):
        raise ValueError(f"{key} is {value!r:.60}, need true or false")
    return bool(value)


def _refuse_unsupported(hf: dict, family: str, n_layers: int) -> None:
    """Raise ValueError for an entry with a value that this model does not compute."""
    if family == "mistral":
        hf = {"sliding_window": 4096} | hf  # transformers' default
    if family in ("qwen2", "qwen3") and not hf.get("use_sliding_window"):
        hf = hf | {"sliding_window": None}
    for key, computed in {
        "sliding_window": (None,),
        "layer_types": (None, ["full_attention"] * n_layers),
        "hidden_act": (None, "silu", "swish"),
        "partial_rotary_factor": (None, 1.0),
        "rope_interleaved": (None, False),
        "quantization_config": (None,),
    }.items():
        if hf.get(key) not in computed:
            raise ValueError(
                f"{key} is {hf[key]!r:.60}, which this model does not compute; it needs full "
                "attention, SiLU, full rotary and plain weights"
            )


def _name_the_unknown(hf: dict, family: str) -> None:
    """Warn of entries that might change what the model computes and that are not read here."""
    unknown = [k for k in hf if k not in NO_EFFECT and hf[k] not in (None, False, [], {}, "")]
    if unknown:
        say_once(
            f"WARNING: config.json's {', '.join(sorted(unknown))[:200]} is not read, here or by "
            "transformers' own Llama; if it changes what the model computes, the model is another"
        )
    if hf.get("auto_map"):
        say_once(
            f"WARNING: config.json's auto_map names code, {str(hf['auto_map'])[:120]}, which is "
            f"never run; the model is computed as transformers' own {family}"
        )
    named = hf.get("architectures") or [FAMILIES[family]]
    if FAMILIES[family] not in (named if isinstance(named, list) else [named]):
        say_once(
            f"WARNING: config.json's architectures is {str(named)[:120]}, its model_type {family}: "
            f"computed as {FAMILIES[family]}"
        )


# ------------------------------------------------------------------------------ rotary and window


def _rope_from_hf(hf: dict, window: int) -> tuple[float, dict | None]:
    """Return (theta, scaling) from transformers 4's two keys or 5's one, as transformers 5 does.

    rope_scaling that holds anything replaces rope_parameters whole; a theta inside goes before one
    at the top level, and original_max_position_embeddings at the top level before the one inside.
    """
    parameters, scaling = (_mapping(hf, key) for key in ("rope_parameters", "rope_scaling"))
    theta = (scaling or parameters).get("rope_theta", hf.get("rope_theta"))
    lost, outer = parameters.get("rope_theta"), hf.get("rope_theta")
    if theta is not None and outer is not None and outer != theta:
        raise ValueError(
            f"rope_theta is {outer!r:.30}, inside the rotary's own entry {theta!r:.30}: "
            "transformers 4 takes the former, 5 the latter; remove the one that the weights were "
            "not trained with"
        )
    for place in (parameters, scaling):
        _refuse_rotary(place)
    if scaling and lost is not None and lost != (10_000.0 if theta is None else theta):
        raise ValueError(
            f"rope_parameters has rope_theta {lost!r:.30}, but transformers reads rope_scaling "
            f"instead, with theta {theta or '10,000'}; leave one of the two, with rope_theta in it"
        )
    if theta is None:
        say_once("the config gives no rope_theta: using 10,000, as the first Llama 2 releases did")
        theta = 10_000.0
    scaling = dict(scaling or parameters)
    scaling.pop("rope_theta", None)
    outer = hf.get("original_max_position_embeddings")
    kind = scaling.get("rope_type") or scaling.get("type")
    if outer is not None and kind in ("llama3", "yarn"):
        inner = scaling.get("original_max_position_embeddings")
        if inner not in (None, outer):
            raise ValueError(
                f"original_max_position_embeddings is {outer!r:.30}, inside the {kind} scaling "
                f"{inner!r:.30}, and readers differ over which counts; remove the wrong one"
            )
        scaling["original_max_position_embeddings"] = outer
    if kind in (None, "default") and scaling.get("factor") not in (None, 1, 1.0):
        raise ValueError(
            f"rope_scaling is {str(scaling)[:80]}, a factor without a kind; add its rope_type"
        )
    return theta, _full_scaling(scaling, window)


def _refuse_rotary(entry: dict) -> None:
    """Raise ValueError for a rotary that is not computed here, or that is of two kinds."""
    kinds = {str(entry[key]) for key in ("rope_type", "type") if entry.get(key) is not None}
    if kinds & {"longrope", "su"}:
        raise ValueError(
            f"the rotary is {min(kinds & {'longrope', 'su'})}: one table of frequencies up to the "
            "original window and another beyond it, two rotaries in one model; which of the two a "
            "longer window would rescale is not defined, so it is not extended: take a checkpoint "
            "with one rotary (default, linear, yarn or llama3)"
        )
    if len(kinds) > 1:
        raise ValueError(
            f"rope_type is {entry['rope_type']!r:.30}, type {entry['type']!r:.30} in one rotary; "
            "remove the wrong one"
        )
    if entry.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(
            f"partial_rotary_factor is {entry['partial_rotary_factor']!r:.60}, inside the rotary's "
            "own entry, where some readers take it and others do not; this model rotates whole "
            "heads: remove it if the weights were trained with whole heads, else take another model"
        )


def _mapping(hf: dict, key: str) -> dict:
    value = hf.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} is {value!r:.60}, need an object or null")
    if nested := [k for k, v in value.items() if isinstance(v, dict)]:
        raise ValueError(f"{key} has {str(nested)[:60]}, a rotary for some layers: not computed")
    return value


def new_scaling(config, rope_scaling: dict | None, name: object) -> dict | None:
    """Return a ModelConfig's scaling after rope_scaling replaced it; None leaves it as it is.

    {"rope_type": "default"} removes a scaling. Raises ValueError for one on top of another.
    """
    if rope_scaling is None:
        return config.rope_scaling
    scaling = _full_scaling(rope_scaling, config.max_position_embeddings)
    if scaling and config.rope_scaling:
        raise ValueError(
            f"{name} is already scaled by {config.rope_scaling}, on top of which "
            f"{scaling['rope_type']!r} is not defined; raise rope_theta instead, or "
            'remove the scaling first with rope_type "default"'
        )
    return scaling


def _full_scaling(scaling: dict, window: int | None) -> dict | None:
    """Return a scaling as ModelConfig has it: None for none, every key under its newest name."""
    scaling = dict(scaling)
    kind = scaling.pop("type", None)  # the key's name before transformers 4.43
    if scaling.setdefault("rope_type", kind or "default") == "default":
        return None
    if scaling["rope_type"] in ("yarn", "llama3"):  # unwritten, it is the window itself
        if scaling.get("original_max_position_embeddings") is None:
            scaling["original_max_position_embeddings"] = window
    if scaling["rope_type"] == "yarn" and scaling.get("factor") is None:
        original = scaling["original_max_position_embeddings"]
        if isinstance(original, int) and original > 0 and window:
            scaling["factor"] = window / original
    return scaling


def windows(hf: dict) -> list[int]:
    """Return the windows, in tokens, that a config.json may mean: several if it is ambiguous.

    A scaled checkpoint's max_position_embeddings is the scaled window in some, the window from
    before the scaling in others (Qwen's recipe for YaRN, LongLoRA, Vicuna). With YaRN and in
    longred's exports, original_max_position_embeddings shows which it is; with linear scaling
    nothing does, unless another entry names the longer window.
    """
    family = str(hf.get("model_type", "llama"))
    window = _number(hf, "max_position_embeddings", WINDOWS.get(family, 2048), most=2**40)
    _, scaling = _rope_from_hf(hf, window)
    factor = (scaling or {}).get("factor")
    if type(factor) not in (int, float) or not 1 < factor < 2**30:
        return [window]
    inner = scaling.get("original_max_position_embeddings")
    original = hf.get("original_max_position_embeddings") if inner is None else inner
    if scaling["rope_type"] == "yarn" and type(original) is int and 0 < original < 2**40:
        longer = max(window, min(round(factor * original), 2**40))
        if longer > window:
            say_once(
                f"the window is {longer:,} tokens, {factor:g} x {original:,} by YaRN: "
                f"max_position_embeddings {window:,} is from before the scaling"
            )
        return [longer]
    longer = min(round(factor * window), 2**40)
    if scaling["rope_type"] == "llama3":
        return [window, longer] if window == original else [window]
    if type(original) is int and 0 < original <= window:  # linear
        return [longer if window == original else window]
    stated = {hf.get(key) for key in WINDOW_NAMES[1:] if type(hf.get(key)) is int} - {window}
    return [longer] if longer in stated else [window, longer]


def original_window(config) -> int | None:
    """Return a ModelConfig's window as it was read, in tokens; None if it is not known.

    Raises ValueError where config.json leaves it in doubt.
    """
    found = windows(config.hf) if config.hf else []
    if len(found) < 2 or config.max_position_embeddings != max(found):
        return config.max_position_embeddings
    scaling, (short, long) = config.rope_scaling, found
    raise ValueError(
        f"max_position_embeddings {short:,} under {scaling['rope_type']} scaling by "
        f"{scaling['factor']:g}: a window of {short:,} tokens, or of {long:,} where that is from "
        "before the scaling (LongLoRA, Vicuna); say which the model was trained on: --original_len "
        f"{short} or --original_len {long}"
    )


# -------------------------------------------------------------------------------------- an export


def exported(hf: dict, window: int | None) -> dict:
    """Return what an export takes over of a config.json, nothing that contradicts it.

    hf: as read, with the new shape and rotary in it. window: tokens; None: not known. Code named by
    auto_map stays behind, and max_length, which would stop generation inside the window.
    """
    if window:
        hf |= {key: window for key in WINDOW_NAMES if type(hf.get(key)) is int}
        hf["max_position_embeddings"] = window
    return hf
