"""Reader of CTranslate2 model files, and the mapping of a CTranslate2 Whisper to Hugging Face's names.

File layout (little-endian, binary version 6; strings are a uint16 length that counts the closing NUL, then the bytes):

    uint32 version · string spec · uint32 revision · uint32 n_variables
    n_variables × [string name · uint8 rank · uint32 shape[rank] · uint8 dtype · uint32 n_bytes · raw data]
    uint32 n_aliases · n_aliases × [string alias · string name]

Source: CTranslate2's documented model specification; checked against CTranslate2's own encoder output in the tests.
"""

from __future__ import annotations

import io
import re
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from palimpsest.files import UserError

VERSION = 6
DTYPES: dict[int, type[np.generic]] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}

Variables = dict[str, npt.NDArray[Any]]


def read_model(data: bytes, origin: str) -> tuple[str, Variables]:
    """The spec's name (e.g. "WhisperSpec") and every variable by name, aliases resolved.

    Raises UserError when `data` (the file called `origin`) is of another version or cut short.
    """
    file = io.BytesIO(data)

    def take(fmt: str) -> Any:
        return struct.unpack("<" + fmt, file.read(struct.calcsize("<" + fmt)))[0]

    def take_string() -> str:
        length = take("H")
        raw = file.read(length)
        if len(raw) < length:
            raise ValueError("it ends inside a name")
        return raw.rstrip(b"\0").decode()

    variables: Variables = {}
    try:
        version = take("I")
        if version != VERSION:
            raise UserError(
                f"{origin} is a CTranslate2 file of version {version}; this reader knows version {VERSION}."
            )
        spec = take_string()
        take("I")  # revision of the spec
        for _ in range(take("I")):
            name = take_string()
            shape = [take("I") for _ in range(take("B"))]
            dtype = DTYPES[take("B")]
            variables[name] = np.frombuffer(file.read(take("I")), dtype).reshape(shape)
        for _ in range(take("I")):
            alias = take_string()
            variables[alias] = variables[take_string()]
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise UserError(f"{origin} is not a whole CTranslate2 model ({error}); install its package again.") from error
    return spec, variables


# Inside one layer: Hugging Face name → CTranslate2 name, and which of the parts that CTranslate2 has fused: q, k, v of
# self-attention, k and v of cross-attention, which only the decoder has.
LAYER: dict[str, tuple[str, int | None]] = {
    "self_attn_layer_norm": ("self_attention/layer_norm", None),
    "self_attn.q_proj": ("self_attention/linear_0", 0),
    "self_attn.k_proj": ("self_attention/linear_0", 1),
    "self_attn.v_proj": ("self_attention/linear_0", 2),
    "self_attn.out_proj": ("self_attention/linear_1", None),
    "encoder_attn_layer_norm": ("attention/layer_norm", None),
    "encoder_attn.q_proj": ("attention/linear_0", None),
    "encoder_attn.k_proj": ("attention/linear_1", 0),
    "encoder_attn.v_proj": ("attention/linear_1", 1),
    "encoder_attn.out_proj": ("attention/linear_2", None),
    "final_layer_norm": ("ffn/layer_norm", None),
    "fc1": ("ffn/linear_0", None),
    "fc2": ("ffn/linear_1", None),
}


def whisper_state_dict(variables: Variables) -> Variables:
    """float32 state dict of `WhisperForConditionalGeneration` from the variables of a WhisperSpec file."""
    state: Variables = {}
    d_model = variables["encoder/layer_norm/gamma"].shape[0]

    def put(name: str, value: npt.NDArray[Any]) -> None:
        state["model." + name] = value.astype(np.float32)

    def put_both(target: str, source: str, part: int | None = None) -> None:
        rows = slice(None) if part is None else slice(part * d_model, (part + 1) * d_model)
        weight, bias = ("gamma", "beta") if source.endswith("layer_norm") else ("weight", "bias")
        put(f"{target}.weight", variables[f"{source}/{weight}"][rows])
        # Whisper's key projections have no bias: CTranslate2 stores zeros for them, Hugging Face nothing.
        if not target.endswith("k_proj"):
            put(f"{target}.bias", variables[f"{source}/{bias}"][rows])

    for stack in ("encoder", "decoder"):
        for layer in range(n_layers(variables, stack)):
            for target, (source, part) in LAYER.items():
                if stack == "decoder" or not target.startswith("encoder_attn"):
                    put_both(f"{stack}.layers.{layer}.{target}", f"{stack}/layer_{layer}/{source}", part)
        put_both(f"{stack}.layer_norm", f"{stack}/layer_norm")
        put(f"{stack}.embed_positions.weight", variables[f"{stack}/position_encodings/encodings"])
    for conv in ("conv1", "conv2"):
        put_both(f"encoder.{conv}", f"encoder/{conv}")
    put("decoder.embed_tokens.weight", variables["decoder/embeddings/weight"])
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]  # tied
    return state


def n_layers(variables: Variables, stack: str) -> int:
    return len({name.split("/")[1] for name in variables if re.match(rf"{stack}/layer_\d", name)})
